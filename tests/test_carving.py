"""The study of carving as a user runs it: small, but whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import onn.functional as F
from experiments import carving, carving_figures, pipeline, presets
from experiments.carving import Options
from experiments.carving_routers import Cut, Routed, by_threshold, distilled, evaluate, forward, inputs, mlps, routers
from experiments.presets import RunConfig
from onn import carve, data, observe, partition, qwen3, tree, weights
from onn.data import Batch
from onn.observe import Json
from onn.qwen3 import Mlp, Model, Moe
from tests.checkpoints import NAME, SMALL, hub_tensors, manifest_text, write_checkpoint
from tests.support import assert_close, assert_same, normal
from tests.test_qwen3 import MOE, config, parameters, random_tokens
from tests.test_tokenizers import write_tokenizer

OPTIONS = Options(
    steps=4, num_experts=10, fractions=(1.0, 0.5, 0.2), calibration_windows=2, eval_windows=2, router_steps=2
)
ARCHITECTURE = config()


def small(options: Options) -> RunConfig:
    """The study's own configuration, of a small model and little text."""
    whole = carving.configuration(options)
    return replace(
        whole,
        model=replace(whole.model, hidden_size=32, intermediate_size=40, num_hidden_layers=2),
        data=replace(whole.data, bytes_per_domain=4000, sequence_length=16, batch_size=4),
    )


def points(results: Mapping[str, Json]) -> list[dict[str, Json]]:
    found = results["points"]
    assert isinstance(found, Sequence)
    return [dict(point) for point in found if isinstance(point, Mapping)]


def batch(seed: int) -> Batch:
    tokens = random_tokens(ARCHITECTURE, 2, 9, seed=seed)
    mask = torch.rand(2, 8, generator=torch.Generator().manual_seed(seed)) < 0.7
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, torch.zeros(2, dtype=torch.int64))


def random_cut(model: Model, *, shared: int = 0) -> tuple[Cut, list[Tensor]]:
    source = torch.Generator().manual_seed(3)
    partitions = [partition.cut(torch.randperm(40, generator=source), num_experts=10) for _ in model.layers]
    experts = tuple(carve.split_by(*row) for row in zip(mlps(model), partitions, strict=True))
    return Cut(experts=experts, speakers=tuple(cut[:, 0] for cut in partitions), shared=shared), partitions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("carving")
    options = replace(OPTIONS, out=path)
    carving.run(options, small(options))
    return path


@pytest.fixture(scope="module")
def results(folder: Path) -> Mapping[str, Json]:
    found = observe.decode((folder / "results.json").read_text())
    assert isinstance(found, dict)
    return found


def test_a_study_measures_every_method_under_every_router_at_every_fraction(results: Mapping[str, Json]) -> None:
    measured = [(p["method"], p["router"], p["target_fraction"]) for p in points(results)]
    expected = [
        (method, router, fraction)
        for method in ("contiguous", "random", "kmeans", "coactivation", "contribution", "shared")
        for fraction in (1.0, 0.5, 0.2)
        for router in ("oracle", "gate", "representative", "analytic", "trained")
        if fraction < 1 or router == "oracle"
    ]
    assert measured == expected


def test_with_all_experts_every_carve_has_the_loss_of_the_dense_model(results: Mapping[str, Json]) -> None:
    whole = [p for p in points(results) if p["target_fraction"] == 1.0]
    dense = observe.number(results, "dense_loss")
    assert [observe.number(p, "loss") for p in whole] == [pytest.approx(dense, rel=1e-5)] * 6
    assert all(p["active_fraction"] == 1.0 for p in whole)


def test_routes_by_rank_open_exactly_what_was_asked_for(results: Mapping[str, Json]) -> None:
    for p in points(results):
        if p["router"] in ("oracle", "representative"):
            assert p["active_fraction"] == pytest.approx(observe.number(p, "target_fraction"))


def test_the_table_and_the_figure_show_every_curve(results: Mapping[str, Json], folder: Path) -> None:
    lines = carving_figures.table(results).splitlines()
    assert f"{observe.number(results, 'dense_loss'):.4f}" in lines[0]
    assert lines[2].split() == ["router", "method", "1", "1/2", "1/5"]
    assert len(lines[3:]) == 5 * 6
    for p in points(results):
        row = next(line for line in lines[3:] if line.split()[:2] == [p["router"], p["method"]])
        assert f"{observe.number(p, 'loss'):.4f}" in row
    with Image.open(folder / "carving.png") as image:
        assert image.width > 1000


def test_the_same_study_gives_the_same_numbers(results: Mapping[str, Json], tmp_path: Path) -> None:
    options = replace(OPTIONS, out=tmp_path, methods=("coactivation", "shared"))
    again = carving.run(options, small(options))
    kept = [p for p in points(results) if p["method"] in ("coactivation", "shared")]
    assert points(again) == kept


def test_the_model_of_a_run_folder_is_carved_in_place_of_a_new_one(tmp_path: Path) -> None:
    saved = small(OPTIONS)
    source = pipeline.prepare(saved)
    wide = tree.map1(lambda leaf: leaf * 2, source.model)
    observe.write_json(tmp_path / "config.json", presets.save(saved))
    weights.save(wide, tmp_path / "dense.safetensors", metadata={})
    options = replace(
        OPTIONS, dense=tmp_path / "dense.safetensors", out=tmp_path / "study", methods=("random",), fractions=(1.0,)
    )
    found = carving.configuration(options)
    assert found.model == saved.model
    study = carving.run(options, found)
    held_out = [b for own in pipeline.held_out_batches(source.corpus, found).values() for b in own]
    assert study["dense_loss"] == evaluate(wide, held_out, None, config=found.model).loss


def test_a_checkpoint_is_carved_without_training(tmp_path: Path) -> None:
    architecture = replace(SMALL, vocab_size=600, max_position_embeddings=64)
    tensors = hub_tensors(architecture)
    checkpoint = write_tokenizer(write_checkpoint(tmp_path / "weights" / NAME, architecture, tensors))
    manifest = tmp_path / "weights_manifest.toml"
    manifest.write_text(manifest_text(checkpoint, architecture, tensors=len(tensors)))
    options = replace(OPTIONS, checkpoint="qwen3-0.6b", out=tmp_path / "study", methods=("contribution", "shared"))
    whole = carving.configuration(options)
    assert whole.train.dense_steps == 0
    small_one = replace(
        whole,
        checkpoint=replace(whole.checkpoint, name=NAME, manifest=manifest, folder=tmp_path / "weights"),
        model=architecture,
        data=replace(whole.data, bytes_per_domain=4000, held_out=0.3, sequence_length=16),
    )
    study = carving.run(options, small_one)
    assert len(points(study)) == 2 * (1 + 2 * 5)
    model = pipeline.prepare(small_one).model
    assert_same(model.norm, tensors["model.norm.weight"].float())


def test_the_wrong_arguments_say_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert carving.main(replace(OPTIONS, checkpoint="qwen3-0.6")) == 2
    assert "did you mean 'qwen3-0.6b'?" in capsys.readouterr().err
    assert carving.main(replace(OPTIONS, dense=tmp_path / "dense.safetensors")) == 2
    assert "config.json" in capsys.readouterr().err


def test_the_forward_pass_is_that_of_the_library_dense_and_routed() -> None:
    model, tokens = parameters(ARCHITECTURE), random_tokens(ARCHITECTURE, 2, 7)
    dense = forward(model, tokens, lambda _, mlp, x: qwen3.mlp_forward(mlp, x), config=ARCHITECTURE)
    assert_same(dense, qwen3.forward(model, tokens, (), config=ARCHITECTURE, moe=None).logits)

    cut, partitions = random_cut(model)
    found = [F.Router(normal(9 + layer, 10, 16), 0.1 * normal(20 + layer, 10)) for layer in range(len(model.layers))]
    carved = carve.carve_by(model, partitions)
    layers = []
    for layer, router in zip(carved.layers, found, strict=True):
        assert isinstance(layer.mlp, Moe)
        layers.append(layer._replace(mlp=layer.mlp._replace(router=router)))
    expected = qwen3.forward(
        carved._replace(layers=tuple(layers)), tokens, ({},) * len(layers), config=ARCHITECTURE, moe=MOE
    )
    choose = by_threshold(found)

    def compute(layer: int, mlp: Mlp, x: Tensor) -> Tensor:
        return F.bank_forward(cut.experts[layer], x, choose(layer, x).to(x.dtype))[0]

    assert 0.1 < float(torch.stack([c.routing.active.double().mean() for c in expected.carved]).mean()) < 0.9
    assert_close(forward(model, tokens, compute, config=ARCHITECTURE), expected.logits, bound=1e-10)


def test_inputs_are_what_the_carved_layers_see() -> None:
    model, tokens = parameters(ARCHITECTURE), random_tokens(ARCHITECTURE, 3, 7)
    carved = carve.carve(model, num_experts=10)
    output = qwen3.forward(carved, tokens, ({},) * 2, config=ARCHITECTURE, moe=MOE)
    assert_close(tuple(inputs(model, tokens, config=ARCHITECTURE)), tuple(c.x for c in output.carved), bound=1e-10)


def test_an_evaluation_counts_masked_targets_once_and_active_pairs() -> None:
    model, text = parameters(ARCHITECTURE), [batch(1), batch(2)]
    cut, _ = random_cut(model)
    total, targets = 0.0, 0
    for b in text:
        logits = qwen3.forward(model, b.tokens, (), config=ARCHITECTURE, moe=None).logits
        chosen = torch.log_softmax(logits, dim=-1).gather(-1, b.targets[..., None])[..., 0]
        total -= float(chosen[b.mask].sum())
        targets += int(b.mask.sum())
    dense = evaluate(model, text, None, config=ARCHITECTURE)
    assert dense.loss == pytest.approx(total / targets, rel=1e-12)
    assert dense.active_fraction == 1.0

    def half(layer: int, x: Tensor) -> Tensor:
        return torch.arange(10).expand(len(x), 10) < (10 if layer else 4)

    assert evaluate(model, text, Routed(cut, half), config=ARCHITECTURE).active_fraction == pytest.approx(0.7)
    none = evaluate(model, text, Routed(cut, lambda _, x: torch.zeros(len(x), 10)), config=ARCHITECTURE)
    silent = model._replace(
        layers=tuple(
            layer._replace(mlp=mlp._replace(down=torch.zeros_like(mlp.down)))
            for layer, mlp in zip(model.layers, mlps(model), strict=True)
        )
    )
    assert none.loss == pytest.approx(evaluate(silent, text, None, config=ARCHITECTURE).loss, rel=1e-12)


@pytest.mark.parametrize("shared", [0, 2])
def test_every_router_opens_the_shared_experts_and_about_as_many_as_it_should(shared: int) -> None:
    model, tokens = parameters(ARCHITECTURE), random_tokens(ARCHITECTURE, 8, 16)
    cut, _ = random_cut(model, shared=shared)
    seen = inputs(model, tokens, config=ARCHITECTURE)
    names = []
    for name, choose in routers(model, cut, seen, k=4, steps=3):
        names.append(name)
        for layer, x in enumerate(seen):
            active = choose(layer, x)
            assert bool(active[:, :shared].all())
            assert bool(active.any(dim=1).all())
            assert float(active.double().mean()) == pytest.approx(0.4, abs=0.1)
            if name in ("oracle", "representative"):
                assert active.sum(dim=1).tolist() == [4] * len(x)
    assert names == ["oracle", "gate", "representative", "analytic", "trained"]


def test_training_brings_a_router_nearer_to_the_choice_and_keeps_lengths_and_shared_thresholds() -> None:
    x, experts = (
        normal(0, 200, 6),
        carve.split_by(Mlp(normal(1, 20, 6), normal(2, 20, 6), normal(3, 6, 20)), torch.arange(20).view(10, 2)),
    )
    chosen = carve.best_experts(experts, x, k=4, shared=1)
    start = F.Router(normal(4, 10, 6), carve.with_shared(0.1 * normal(5, 10), shared=1))
    after = distilled(start, x, chosen, steps=60)

    def agreement(router: F.Router) -> float:
        return float((by_threshold([router])(0, x) == chosen).double().mean())

    assert agreement(after) > agreement(start) + 0.1
    lengths = start.prototypes.norm(dim=-1)
    assert float(after.thresholds[0]) == -torch.inf
    assert bool(torch.isfinite(after.thresholds[1:]).all())
    assert_same(distilled(start, x, chosen, steps=0).thresholds, start.thresholds)
    assert_close(distilled(start, x, chosen, steps=0).prototypes.norm(dim=-1), lengths, bound=1e-12)


def test_calibration_text_is_the_beginning_of_every_training_text() -> None:
    settings = small(OPTIONS)
    corpus = pipeline.prepare(settings).corpus
    tokens = carving.calibration_tokens(corpus, OPTIONS, settings)
    expected = [domain[:32].view(2, 16).long() for domain in corpus.train]
    assert_same(tokens, torch.cat(expected))
    assert isinstance(data.ByteTokenizer().decode(tokens[0]), str)
