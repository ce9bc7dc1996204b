"""The main job end to end: profile, search, prove, measure, and say what came out."""
