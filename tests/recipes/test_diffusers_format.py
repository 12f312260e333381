"""The digits as a folder of diffusers: the same network, and the same images from the same noise."""

from __future__ import annotations

import pytest
import torch

from engine.checkpoints.load import load_checkpoint
from judging.digits import CHECKPOINT, FACTS
from recipes.diffusers_format import main
from recipes.digits_net import digits_unet


def test_the_folder_is_the_shipped_network(tmp_path, capsys):
    pytest.importorskip("diffusers")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("not a network")
    assert main([str(tmp_path / "mine")]) == 2
    assert "mine" in capsys.readouterr().err
    for _ in range(2):
        assert main([str(tmp_path / "digits")]) == 0
    read, shipped = load_checkpoint(tmp_path / "digits"), load_checkpoint(CHECKPOINT, **FACTS)
    assert read.config.blocks == digits_unet().blocks
    weights = shipped.unet().state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in read.unet().state_dict().items())
    assert (read.diffusion.schedule.betas == shipped.diffusion.schedule.betas).all()
