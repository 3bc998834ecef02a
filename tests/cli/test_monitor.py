"""Every number that the monitor draws against counts by loops: two ranks, accumulation, checkpointing."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lit
from lit_modules.retention_map import BETWEEN, BOTTOM, LEFT, PANEL, TOP, colours
from routing import ShiftedCosine, TokenKind
from routing.capacity import kept_count

ROOT = Path(__file__).parent.parent.parent
QUICKSTART = f"--config={ROOT / 'configs/quickstart.yaml'}"
LAYERS, EVERY, STEPS = 4, 2, 4
KINDS = ("scalars", "images", "histograms")
CAPACITY = ShiftedCosine(high=0.9, low=0.3)
SHARES = {layer: CAPACITY(layer / (LAYERS - 1), 0.0) for layer in range(LAYERS)}
SHARES = {layer: share for layer, share in SHARES.items() if share < 1}  # the layers that p-MoD routes
HOW = [
    "--monitor.detail=detailed",
    "--model.init_args.checkpoint_activations=true",
    "--model.init_args.plugins.depth.init_args.capacity={class_path: ShiftedCosine, init_args: {high: 0.9, low: 0.3}}",
    "--model.init_args.plugins.depth.init_args.router={class_path: LinearRouter, init_args: {std: 0.5}}",
    "--data.init_args.text_share=0.5",
    "--trainer.strategy=ddp",
    "--trainer.devices=2",
    "--trainer.accumulate_grad_batches=2",
    f"--model.init_args.backbone.init_args.layers={LAYERS}",
    f"--trainer.max_steps={STEPS}",
    f"--trainer.log_every_n_steps={EVERY}",
    "--trainer.limit_val_batches=1",
]


EXPERTS = "model: {init_args: {plugins: {moe: {class_path: MixtureOfExperts}}}}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One training of two ranks, and the folder of what its spies wrote."""
    folder = tmp_path_factory.mktemp("monitored")
    tiny = [f"--config={ROOT / 'configs/overrides/tiny.yaml'}", f"--data.init_args.root={folder}/digits"]
    tiny += [f"--model.init_args.backbone.init_args.folder={folder}/digits"]
    tiny += [f"--trainer.logger.init_args.save_dir={folder}"]
    spy = ["--trainer.callbacks+=tests.spy.Spy", f"--trainer.callbacks.folder={folder}"]
    done = subprocess.run(
        [sys.executable, "-m", "lit", "fit", QUICKSTART, *tiny, *HOW, *spy],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:]
    return folder


@pytest.fixture(scope="module")
def drawn(run):
    (file,) = run.rglob("events.out.*")
    return EventAccumulator(str(file), size_guidance={"histograms": 0, "scalars": 0}).Reload()


def batches(run, step):
    """What all ranks saw in the accumulated batches of one optimizer step."""
    seen = [torch.load(path, weights_only=False) for path in sorted(run.glob("?_*.pt"))]
    seen = [each for each in seen if each["step"] == step]
    assert len(seen) == 4  # two ranks, two batches
    return seen


def oracle(run, step, layer):
    """Candidates, kept, bits and scores of one layer in one step, token by token."""
    candidates = kept = 0
    bits, scores = [], []
    for batch in batches(run, step):
        assert len(batch["scores"]) == len(SHARES)  # a replay asks no router
        scores_BTE = batch["scores"][list(SHARES).index(layer)]
        for b, row in enumerate(batch["kind_BT"].tolist()):
            vision = [t for t, kind in enumerate(row) if kind == TokenKind.VISION]
            candidates += len(vision)
            kept += kept_count(len(vision), SHARES[layer])
            for t in vision:
                score = float(scores_BTE[b, t, 0])
                p = 1 / (1 + np.exp(-score))
                bits.append(-p * np.log2(p) - (1 - p) * np.log2(1 - p))
                scores.append(score)
    return candidates, kept, bits, scores


def value(drawn, tag, step):
    (found,) = [event.value for event in drawn.Scalars(tag) if event.step == step]
    return found


@pytest.mark.parametrize("step", range(EVERY - 1, STEPS, EVERY))
def test_scalars_are_counts_over_ranks_and_accumulated_batches(run, drawn, step):
    each = {layer: oracle(run, step, layer) for layer in SHARES}
    for layer, (candidates, kept, bits, _) in each.items():
        assert value(drawn, f"depth/retention/layer_{layer:02}", step) == pytest.approx(kept / candidates, abs=1e-6)
        assert value(drawn, f"depth/target/layer_{layer:02}", step) == pytest.approx(SHARES[layer], abs=1e-6)
        assert value(drawn, f"router/entropy/layer_{layer:02}", step) == pytest.approx(np.mean(bits), abs=1e-5)
    share = sum(kept for _, kept, _, _ in each.values()) / sum(candidates for candidates, *_ in each.values())
    assert value(drawn, "depth/retention", step) == pytest.approx(share, abs=1e-6)
    assert value(drawn, "depth/retention/vision", step) == pytest.approx(share, abs=1e-6)
    every_bit = np.mean([bit for _, _, bits, _ in each.values() for bit in bits])
    assert value(drawn, "router/entropy", step) == pytest.approx(every_bit, abs=1e-5)
    assert "depth/retention/question" not in drawn.Tags()["scalars"]  # not p-MoD's to route


@pytest.mark.parametrize("step", range(EVERY - 1, STEPS, EVERY))
def test_histograms_hold_every_candidates_score_once(run, drawn, step):
    pools = {f"/layer_{layer:02}": oracle(run, step, layer)[3] for layer in SHARES}
    for suffix, scores in {**pools, "": [score for pool in pools.values() for score in pool]}.items():
        (found,) = [e.histogram_value for e in drawn.Histograms(f"router/scores{suffix}") if e.step == step]
        assert found.num == len(scores) == sum(found.bucket)
        assert (found.min, found.max) == (pytest.approx(min(scores)), pytest.approx(max(scores)))
        assert found.sum == pytest.approx(sum(scores), rel=1e-5)
        assert found.sum_squares == pytest.approx(sum(score**2 for score in scores), rel=1e-5)
        low = found.min
        for limit, count in zip(found.bucket_limit, found.bucket, strict=True):
            inside = sum(low <= score < limit or (score == limit == found.max) for score in scores)
            assert count == inside
            low = limit


def test_phases_are_counts_over_ranks_of_what_was_asked(run, drawn):
    asked = [torch.load(path) for path in run.glob(f"asked_?_{STEPS}.pt")]
    rows = [row for kind_BT in asked for row in kind_BT.tolist()]
    vision = [sum(kind == TokenKind.VISION for kind in row) for row in rows]
    text = sum(kind not in (TokenKind.VISION, TokenKind.PAD) for row in rows for kind in row)
    kept = {layer: sum(kept_count(n, share) for n in vision) for layer, share in SHARES.items()}
    last = {tag: drawn.Scalars(tag)[-1].value for tag in drawn.Tags()["scalars"]}
    for layer, n in kept.items():
        assert last[f"depth/retention/prefill/layer_{layer:02}"] == pytest.approx(n / sum(vision))
        assert last[f"depth/kv_share/layer_{layer:02}"] == pytest.approx((n + text) / (sum(vision) + text))
    everything = LAYERS * (sum(vision) + text)
    stored = sum(kept.values()) + len(SHARES) * text + (LAYERS - len(SHARES)) * (sum(vision) + text)
    assert last["depth/retention/prefill"] == pytest.approx(sum(kept.values()) / (len(SHARES) * sum(vision)))
    assert last["depth/kv_share"] == pytest.approx(stored / everything) and len(asked) == 2
    assert not [tag for tag in last if "decode" in tag]  # answers are not p-MoD's to route


def test_the_map_shows_the_counted_shares(run):
    (file,) = run.rglob("retention_map.png")
    pixels = np.asarray(Image.open(file))
    steps = range(EVERY - 1, STEPS, EVERY)
    row = (pixels.shape[0] - TOP - BETWEEN - BOTTOM) // (2 * len(SHARES))
    for column, step in enumerate(steps):
        for band, (layer, asked) in enumerate(SHARES.items()):
            candidates, kept, _, _ = oracle(run, step, layer)
            x, y = LEFT + (2 * column + 1) * PANEL // (2 * len(steps)), TOP + band * row + row // 2
            assert (pixels[y, x] == colours(np.array(asked))).all()
            assert (pixels[y + len(SHARES) * row + BETWEEN, x] == colours(np.array(kept / candidates))).all()


def test_brief_writes_at_most_forty_tags_and_nothing_writes_none(tiny, tmp_path):
    lit.main(
        ["fit", QUICKSTART, *tiny, "--trainer.log_every_n_steps=1", "--model.init_args.generation.max_new_tokens=2"]
    )
    (file,) = tmp_path.rglob("events.out.*")
    tags = EventAccumulator(str(file)).Reload().Tags()
    ours = [tag for kind in KINDS for tag in tags[kind]]
    assert {"depth/retention", "depth/map", "router/scores", "router/entropy"} <= set(ours)
    assert {"depth/retention/prefill", "depth/kv_share"} <= set(ours)
    assert len(ours) <= 40 and not [tag for tag in ours if "/layer_" in tag], ours
    lit.main(["fit", QUICKSTART, *tiny, "--trainer.log_every_n_steps=1", "--monitor.detail=nothing"])
    (later,) = set(tmp_path.rglob("events.out.*")) - {file}
    left = EventAccumulator(str(later)).Reload().Tags()
    assert not [tag for kind in KINDS for tag in left[kind] if tag.startswith(("depth/", "router/"))]


def test_experts_are_drawn_beside_depth_in_fit_and_do_not_disturb_validate(tiny, tmp_path):
    (tmp_path / "experts.yaml").write_text(EXPERTS)
    routed = [QUICKSTART, *tiny, f"--config={tmp_path / 'experts.yaml'}", "--monitor.detail=detailed"]
    routed += ["--trainer.callbacks+=lit_modules.RoutingTruth", "--trainer.callbacks+=lit_modules.OutcomeWriter"]
    lit.main(["fit", *routed])
    (file,) = tmp_path.rglob("events.out.*")
    tags = EventAccumulator(str(file)).Reload().Tags()
    assert {"width/load_max", "width/information", "width/load/layer_02_mlp/expert_3"} <= set(tags["scalars"])
    assert {"depth/retention", "router/entropy", "router/entropy/layer_02_mlp"} <= set(tags["scalars"])
    assert {"width/map", "depth/map"} <= set(tags["images"]) and "router/scores/layer_02_mlp" in tags["histograms"]
    assert Image.open(next(tmp_path.rglob("expert_map.png"))).size[0] > 400
    lit.main(["validate", *routed, f"--ckpt_path={next(tmp_path.rglob('last.ckpt'))}"])
