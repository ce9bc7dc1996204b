"""What fewer experts would gain on hardware one does not have. Needs no torch.

`hardware` GPUs and links; `model` what a step of a model computes; `routing` and `activation` how
many experts wake; `work`, `constants`, `fit`, `tables` the time of a MoE layer, from measurements;
`deployment` and `step` the time of a whole step; `load` and `serve` throughput and latency, and
`simulate` the same event by event; `sweep` deployments compared; `predict` puts them together.
"""
