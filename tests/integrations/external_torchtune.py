"""With torchtune's configuration, which hands over bare parameters. Run by tools/check_integrations."""

import torch
from omegaconf import OmegaConf
from torch import nn
from torchtune import config
from torchtune.models.llama3_1 import llama3_1
from torchtune.training.lr_schedulers import get_lr

from coupled_adam.integrations.bare_parameters import VocabularyCoupledAdam


def test_torchtune_builds_it_from_its_settings_and_couples_the_head() -> None:
    torch.manual_seed(0)
    model = llama3_1(vocab_size=64, num_layers=1, num_heads=2, num_kv_heads=2, embed_dim=16, max_seq_len=16)
    component = "coupled_adam.integrations.bare_parameters.VocabularyCoupledAdam"
    settings = {"_component_": component, "vocabulary_size": 64, "which": "last", "lr": 1e-2, "betas": [0.9, 0.95]}
    optimizer = config.instantiate(OmegaConf.create(settings), model.parameters())
    assert isinstance(optimizer, VocabularyCoupledAdam)
    assert optimizer.param_groups[0]["params"] == [model.output.weight]
    tokens = torch.randint(64, (2, 9))
    nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()
    assert optimizer.state[model.output.weight]["exp_avg_sq"].shape == (1, 16)


def test_torchtune_finds_the_one_learning_rate_that_it_wants() -> None:
    parameters = [nn.Parameter(torch.zeros(64, 16)), nn.Parameter(torch.zeros(16, 16))]
    optimizer = VocabularyCoupledAdam(parameters, vocabulary_size=64, lr=1e-2, embedding_lr_factor=10.0)
    assert get_lr(optimizer) == 1e-2
