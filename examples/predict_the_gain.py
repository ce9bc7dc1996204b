"""What would fewer experts gain on a machine that is not here?

    python examples/predict_the_gain.py

Predicts DeepSeek-V3 on eight H200, the full model beside two ways to choose fewer experts, and says
what the figures stand on. Nothing is downloaded, no GPU is needed.
"""

import leanmoe

RULES = {"k = 6 for all": {"top_k": 6}, "4 guaranteed, shared": {"guaranteed": 4}}

print("DeepSeek-V3 on 8 H200: output tokens/s and what a plan gains (modelled)")
for name, rule in RULES.items():
    results = leanmoe.predict(
        "deepseek-ai/DeepSeek-V3",
        gpu="h200",
        tensor_parallel_size=8,
        concurrency=(1, 8, 32, 128),
        **rule,
    )
    print(name)
    for each in results.predictions:
        assert each.gain is not None
        tokens, gain = each.full.output_throughput, 100 * (each.gain - 1)
        print(f"{each.concurrency:6d} requests: {tokens:6.0f} tokens/s, {gain:+.1f}%")
print("\nIt stands on:")
for part, words in results.predictions[0].stands_on.items():
    print(f"  {part}: {words}")
