"""What a model's router does on real text: recorded once, saved, and replayed under any rule."""
