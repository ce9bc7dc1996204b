"""The picture of the training loss."""

from __future__ import annotations

from xml.etree import ElementTree

from leanmoe.core.files import read_json
from reference_model.card import HERE, RESULTS
from reference_model.loss_plot import loss_svg


def test_the_packaged_picture_is_what_the_training_log_says() -> None:
    training = read_json(RESULTS / "training.json", "training")
    drawn = loss_svg(training["train_curve"], training["dev_curve"])
    assert drawn == (HERE / "loss.svg").read_text()
    words = [each.text for each in ElementTree.fromstring(drawn)]
    assert {"2.5", "1000M", "held-out dev slice"} <= set(words)
