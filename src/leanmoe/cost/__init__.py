"""What fewer experts would gain on hardware one does not have. Needs no torch.

`hardware` GPUs and links; `model` what a step of a model computes; `routing` how many experts wake;
`work`, `constants`, `fit`, `tables` the time of a MoE layer, from measurements; `step` the time of a
whole step on a deployment; `serve` throughput and latency under a load, and `simulate` the same
event by event; `sweep` deployments compared; `predict` puts them together.
"""
