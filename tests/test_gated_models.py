"""ArmoRM, QRM and URM: score and attributes are what their own classes give, written out here on transformers'
backbone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

import lightrm
from lightrm import errors
from lightrm.checkpoints.gated_heads import ARMO, HELPSTEER, PROMPT_END
from tests.zoo import LLAMA_CONFIG, WIDTH, Specimen, Weights, llama_weights

LLAMA3 = 128256
EOT, START, ASSISTANT, END, BREAK = PROMPT_END
# Two answers to one prompt, a conversation of two turns, and a prompt alone in another pack.
IDS = [
    [START, 7, END, 5, 9, *PROMPT_END, 40, 41, EOT],
    [START, 7, END, 5, 9, *PROMPT_END, 40, 42, 43, 44, EOT],
    [START, 7, END, 3, *PROMPT_END, 8, EOT, START, 7, END, 4, *PROMPT_END, 12, EOT],
]


def gating(inputs: int, outputs: int, norms: bool) -> tuple[nn.ModuleList, Callable[[torch.Tensor], torch.Tensor]]:
    """The layers of a GatingNetwork, and its forward up to the softmax."""
    layers: list[nn.Module] = []
    for _ in range(3):
        layers.append(nn.Linear(inputs, 24, bias=not norms))
        layers += [nn.ReLU(), nn.BatchNorm1d(24)] if norms else []
        inputs = 24
    layers.append(nn.Linear(inputs, outputs))
    made = nn.ModuleList(layers).eval()
    for name, value in [*made.named_parameters(), *made.named_buffers()]:
        with torch.no_grad():
            if value.is_floating_point():
                value.uniform_(0.5, 2.0) if "var" in name else value.normal_(std=0.6)

    def forward(x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(made):
            x = layer(x) if norms or i == len(made) - 1 else functional.relu(layer(x))
        return x

    return made, forward


Own = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # answer, prompt -> score, attributes


def armo(count: int) -> tuple[Weights, dict, Own]:
    torch.manual_seed(count)
    layers, forward = gating(WIDTH, count, norms=False)
    regression, transform, scale = torch.randn(count, WIDTH), torch.randn(count, count), torch.tensor([1.7])

    def own(answer: torch.Tensor, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rewards = answer @ regression.T
        gate = functional.softmax(forward(prompt) / 3.0, dim=1) * scale[0]
        return torch.sum(gate * (rewards @ transform), dim=1), rewards

    tensors = {"regression_layer.weight": regression, "reward_transform_matrix": transform, "gating.logit_scale": scale}
    tensors |= {f"gating.layers.{name}": value for name, value in layers.state_dict().items()}
    return tensors, {"num_objectives": count, "gating_temperature": 3, "gating_n_hidden": 3}, own


def qrm(count: int) -> tuple[Weights, dict, Own]:
    torch.manual_seed(count)
    quantiles = 4
    layers, forward = gating(WIDTH, count, norms=True)
    regression, transform = torch.randn(quantiles * count, WIDTH), torch.randn(count, count)
    scale = torch.tensor([0.8])

    def own(answer: torch.Tensor, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rewards = (answer @ regression.T).reshape(-1, count, quantiles)
        gate = functional.softmax(forward(prompt) / 10, dim=1) * scale[0]
        adjusted = rewards.mean(dim=2) @ transform
        return torch.sum(gate * adjusted, dim=1), adjusted

    tensors = {"regression_layer.weight": regression, "reward_transform_matrix": transform, "gating.logit_scale": scale}
    tensors |= {f"gating.layers.{name}": value for name, value in layers.state_dict().items()}
    return tensors, {"num_objectives": count, "num_quantiles": quantiles}, own


def urm(count: int) -> tuple[Weights, dict, Own]:
    torch.manual_seed(count)
    score = torch.randn(2 * count, WIDTH)
    fc = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.SELU(), nn.Linear(WIDTH, WIDTH), nn.SELU(), nn.Linear(WIDTH, count)
    )  # fmt: skip

    def own(answer: torch.Tensor, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        means = (answer @ score.T).view(-1, count, 2)[:, :, 0]
        return (means * fc(answer)).sum(dim=-1), means

    tensors = {"score.weight": score} | {f"weights.fc.{name}": value for name, value in fc.state_dict().items()}
    return tensors, {"architectures": ["LlamaForSequenceClassificationWithNormal_Weights"], "num_labels": 10}, own


MODELS = {
    "armorm": (armo, "LlamaForRewardModelWithGating", ARMO),
    "qrm": (qrm, "LlamaForRewardModelWithGating", ARMO[:5]),
    "urm": (urm, "LlamaForSequenceClassificationWithNormal_Weights", HELPSTEER),
}
TABLE = torch.randn(LLAMA3, WIDTH, generator=torch.Generator().manual_seed(2)).half()


@pytest.fixture(scope="module", params=MODELS)
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Own]:
    make, name, names = MODELS[request.param]
    tensors, config, own = make(len(names))
    body = llama_weights() | {"model.embed_tokens.weight": TABLE}
    config = {**LLAMA_CONFIG, "vocab_size": LLAMA3, "architectures": [name], **config}
    folder = Specimen({"model.safetensors": body | tensors}, config).write(tmp_path_factory.mktemp(request.param))
    return request.param, folder, own


def expected(folder: Path, own: Own) -> tuple[np.ndarray, np.ndarray]:
    model = transformers.LlamaModel.from_pretrained(folder, dtype=torch.float32).eval()
    answers, prompts = [], []
    with torch.inference_mode():
        for ids in IDS:
            hidden = model(torch.tensor([ids])).last_hidden_state[0]
            at = max(k for k in range(len(ids)) if tuple(ids[k : k + 5]) == PROMPT_END)
            answers.append(hidden[-1])
            prompts.append(hidden[at])
        score, attributes = own(torch.stack(answers), torch.stack(prompts))
    return score.numpy(), attributes.numpy()


def test_score_and_attributes_are_those_of_the_models_own_class(one: tuple[str, Path, Own]) -> None:
    kind, folder, own = one
    score, attributes = expected(folder, own)
    rm = lightrm.load(folder, scheme="fp32", device="cpu")
    assert (rm.checkpoint.layout.name, rm.attributes) == (kind, MODELS[kind][2])
    np.testing.assert_allclose(rm.score_ids(IDS), score, rtol=1e-4, atol=1e-4)
    found = rm.engine.all_scores(IDS, head=rm._head.attributes())
    np.testing.assert_allclose(found, attributes, rtol=1e-4, atol=1e-4)
    label = rm.attributes[2]
    labelled = lightrm.load(folder, scheme="fp32", device="cpu", label=label)
    np.testing.assert_allclose(labelled.score_ids(IDS), attributes[:, 2], rtol=1e-4, atol=1e-4)


def test_w8a8_scores_do_not_depend_on_the_batch(one: tuple[str, Path, Own], tmp_path: Path) -> None:
    _, folder, own = one
    rm = lightrm.load(folder, scheme="w8a8", device="cpu")
    together = rm.score_ids(IDS)
    assert together.tobytes() == np.concatenate([rm.score_ids([ids]) for ids in IDS]).tobytes()
    found = rm.engine.all_scores(IDS, head=rm._head.attributes())
    for right, rounded in zip(expected(folder, own), (together, found), strict=True):
        assert (right**2).sum() > 100 * ((rounded - right) ** 2).sum(), "20 dB: norm and rotation are folded into both"
    rm.save(tmp_path / "folder")
    restored = lightrm.load(tmp_path / "folder", device="cpu")
    assert restored.score_ids(IDS).tobytes() == together.tobytes()
    assert restored.attributes == rm.attributes


def test_the_prompt_is_read_inside_the_answers_sequence(one: tuple[str, Path, Own]) -> None:
    """However the packs are cut, and at no further token."""
    _, folder, _ = one
    rm = lightrm.load(folder, scheme="w8a8", device="cpu")
    whole = rm.score_ids(IDS * 3)
    rm.token_budget = 20
    assert rm.score_ids(IDS * 3).tobytes() == whole.tobytes()


def test_what_a_gate_cannot_read_is_refused(one: tuple[str, Path, Own], tmp_path: Path) -> None:
    kind, folder, _ = one
    config = json.loads((folder / "config.json").read_text())

    def changed(**more: object) -> lightrm.RewardModel:
        (tmp_path / "config.json").write_text(json.dumps({**config, **more}))
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
        return lightrm.load(tmp_path, scheme="fp32", device="cpu")

    if kind == "urm":
        rm = changed(pad_token_id=EOT)
        with pytest.raises(lightrm.InputError, match="holds this model's pad token"):
            rm.score_ids(IDS)
        return
    rm = changed(pad_token_id=128001)
    np.testing.assert_array_equal(rm.score_ids([[*IDS[0], 128001, 5]]), rm.score_ids(IDS[:1]))
    with pytest.raises(lightrm.InputError, match="gate is read where the token ids"):
        rm.score_ids([[5, 6, 7]])
    with pytest.raises(errors.ConfigError, match="vocab_size"):
        changed(vocab_size=1000)
    with pytest.raises(errors.TensorMismatchError, match="num_objectives is 7"):
        changed(num_objectives=7)
    if kind == "qrm":
        with pytest.raises(errors.TensorMismatchError, match="num_quantiles is 3"):
            changed(num_quantiles=3)
