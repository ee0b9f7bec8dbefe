"""What moves in each mode, what rests, and that a run of every mode can be broken off and leaves a plain network."""

import copy

import numpy as np
import pytest
import torch

from carina.data.labels import to_targets
from carina.data.store import Selection, select
from carina.errors import CarinaError
from carina.finetune.classify import Classification, check, train_head
from carina.finetune.modes import add_lora, blocks, merge_lora, train_last
from carina.finetune.recipe import FinetuneRecipe, LoraSettings
from carina.metrics.ranking import auroc
from carina.models.backbones import Backbone, random_backbone
from carina.models.heads import make_head
from carina.recipes import build
from carina.runs import Run
from carina.training.engine import Engine

LABELS = ["Opacity", "Effusion", "abnormal"]
WORDS = [f"labels={LABELS}", "steps=6", "batch_size=8", "threads=1", "wandb=off", "precision=no", "store=given",
         "checkpoint_every=3", "head.hidden=16", "optim.lr=1e-3"]  # fmt: skip


def recipe(*words: str) -> FinetuneRecipe:
    found = build("finetune", FinetuneRecipe, "classify", [*WORDS, *words])
    check(found)
    return found


@pytest.fixture(scope="module")
def rows(phantom_store) -> tuple[Selection, np.ndarray]:
    train = select(str(phantom_store), rows="train")
    return train, to_targets(train.targets(LABELS))


def task(given: FinetuneRecipe, rows, architecture: str = "resnet18") -> Classification:
    return Classification(random_backbone(architecture, 32, 0), given, *rows)


def engine(work: Classification, rows) -> Engine:
    return Engine(work, rows[0], work.recipe, scales=[32], targets=rows[1], quiet=True)


def trained(work: Classification, rows, out) -> tuple[Classification, dict[str, torch.Tensor]]:
    """The task after its steps and its tensors from before them."""
    before = copy.deepcopy(work.state_dict())
    engine(work, rows).fit(Run.start(out, "finetune", work.recipe, quiet=True))
    return work, before


def test_partial_moves_the_last_blocks_and_nothing_else(rows, tmp_path):
    work, before = trained(task(recipe("mode=partial", "blocks=2"), rows), rows, tmp_path / "run")
    after = work.state_dict()
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    expected = {key for key in after if key.startswith(("backbone.network.layer4.", "head."))}
    assert moved == expected, "batch norms of frozen blocks keep their statistics too"
    parameters = dict(work.named_parameters())
    assert work.trained_parameters == sum(after[key].numel() for key in expected & parameters.keys())


@pytest.mark.parametrize(
    ("architecture", "count", "last"),
    [
        ("resnet18", 8, "layer4.1."),
        ("vit_tiny_patch16_224", 12, ("blocks.11.", "norm.")),
        ("swin_tiny_patch4_window7_224", 12, ("layers.3.blocks.1.", "norm.", "head.")),
        ("tf_efficientnet_lite0", 16, ("blocks.6.0.", "conv_head.", "bn2.")),
        ("densenet121", 58, ("features.denseblock4.denselayer16.", "features.norm5.")),
        ("convnext_atto", 12, ("stages.3.blocks.1.", "head.norm.")),
    ],
)
def test_the_last_block_of_each_family(architecture, count, last):
    backbone = random_backbone(architecture, 64, 0)
    known = blocks(backbone)
    assert len(known) == count
    train_last(backbone, 1)
    moving = {name for name, parameter in backbone.network.named_parameters() if parameter.requires_grad}
    assert moving == {name for name, _ in backbone.network.named_parameters() if name.startswith(last)}
    with pytest.raises(CarinaError, match=f"has {count} blocks"):
        train_last(backbone, count + 1)


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_lora_changes_attention_alone_and_leaves_a_plain_network(architecture, rows, tmp_path):
    start = random_backbone(architecture, 32, 0)
    work, _ = trained(task(recipe("mode=lora", "lora.rank=2"), rows, architecture), rows, tmp_path / "run")
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        adapted = work.eval().backbone(images)
        work.finish()
        assert work.backbone.network.state_dict().keys() == start.network.state_dict().keys()
        torch.testing.assert_close(work.backbone(images), adapted, rtol=1e-4, atol=1e-5)
    old, new = start.network.state_dict(), work.backbone.network.state_dict()
    moved = {key for key in old if not torch.equal(old[key], new[key])}
    assert moved == {key for key in old if key.endswith(("attn.qkv.weight", "attn.proj.weight"))}
    for key in moved:  # what was added has the rank that was asked for
        values = torch.linalg.svdvals((new[key] - old[key]).double())
        assert values[2] < 1e-5 * values[0] or values[0] == 0
    plain = Backbone(random_backbone(architecture, 32, 1).network, start.spec)
    plain.network.load_state_dict(new)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(images), work.backbone(images), rtol=0, atol=0)


def test_lora_changes_nothing_at_first():
    backbone = random_backbone("vit_tiny_patch16_224", 32, 0).eval()
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        before = backbone(images)
        add_lora(backbone, LoraSettings(rank=4, alpha=8, dropout=0.0), 0)
        assert torch.equal(backbone(images), before)
        merge_lora(backbone)
        assert torch.equal(backbone(images), before)


@pytest.mark.parametrize("architecture", ["resnet18", "eva02_tiny_patch14_224"])
def test_lora_is_refused_where_it_would_do_nothing(architecture):
    """EVA-02's small networks have projections, but take the weight out of them and pass the layer by."""
    backbone = random_backbone(architecture, 28, 0)
    with pytest.raises(CarinaError, match="mode=lora changes the projections"):
        add_lora(backbone, LoraSettings(rank=4, alpha=8, dropout=0.0), 0)


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "words",
    [
        ("mode=partial", "loss.name=focal", "mixing.name=mixup"),
        ("mode=full", "head.name=multiscale", "consistency.weight=1", "views.flip=0.5", "loss.name=ldam_drw"),
        ("mode=lora", "head.name=attentive", "head.noisy_or=true", "mixing.name=cutmix", "lora.dropout=0.1"),
    ],
    ids=["partial", "full", "lora"],
)
def test_resumed_is_uninterrupted(words, rows, tmp_path):
    given = recipe(*words)
    architecture = "vit_tiny_patch16_224" if "mode=lora" in words else "resnet18"
    whole, _ = trained(task(given, rows, architecture), rows, tmp_path / "whole")

    def stop(step, means):
        if step == 4:  # after the checkpoint of three steps
            raise Stop
        return {}

    with pytest.raises(Stop):
        engine(task(given, rows, architecture), rows).fit(
            Run.start(tmp_path / "broken", "finetune", given, quiet=True), observe=stop
        )
    again = task(given, rows, architecture)
    run = Run.start(tmp_path / "broken", "finetune", given, resume=True, quiet=True)
    engine(again, rows).fit(run, resume=True)
    first, second = whole.state_dict(), again.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_accumulated_batches_count_as_the_steps_they_make(rows):
    """ldam_drw weighs the classes again from a step on, not from a micro-batch on."""
    given = recipe(
        "mode=full", "loss.name=ldam_drw", "loss.reweight_from=0.5", "accumulate=4", "batch_size=16", "steps=4"
    )
    work = task(given, rows).eval()
    seen = []
    loss = work.loss
    work.loss = lambda logits, targets, step: seen.append(step) or loss(logits, targets, step)
    for step, pieces in engine(work, rows).batches.from_step(0):
        for piece in pieces:
            work(piece)
        assert seen[-4:] == [step] * 4


# -- heads on frozen weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "attentive", "lse", "multiscale"])
def test_a_head_learns_from_what_frozen_weights_gave(name):
    """A label lies at one place, on a channel of its own, far from zero."""
    rng = np.random.default_rng(0)
    targets = (rng.random((400, 2)) < 0.4).astype(np.float32)
    given = recipe("mode=frozen", f"head.name={name}", "labels=[a,b]", "steps=150", "batch_size=32", "optim.lr=5e-3")
    backbone = random_backbone("test_resnet", 64, 0)
    head = make_head(given.head, backbone, given.labels, 0)
    maps = []
    for part in head.read(backbone.eval(), torch.zeros(1, 1, 64, 64)):
        own = rng.normal(size=(400, *part.shape[1:])).astype(np.float32) * 0.1
        if own.ndim == 2:
            own[:, :2] += targets * 1.0
        else:
            place = rng.integers(0, own.shape[2] * own.shape[3], 400)
            own.reshape(400, own.shape[1], -1)[np.arange(400)[:, None], [[0, 1]], place[:, None]] += targets * 3.0
        maps.append(own * 10 + 100)
    unknown = targets.copy()
    unknown[::7, 0] = np.nan
    rows = np.arange(400) < 300
    fitted = train_head(head, [part[rows] for part in maps], unknown[rows], given, seed=0)
    first = copy.deepcopy(fitted.state_dict())
    with torch.no_grad():
        scores = fitted([torch.from_numpy(part[~rows]) for part in maps]).numpy()
    assert min(auroc(targets[~rows][:, column], scores[:, column]) for column in range(2)) > 0.75
    again = train_head(
        make_head(given.head, backbone, given.labels, 0), [p[rows] for p in maps], unknown[rows], given, 0
    )
    assert all(torch.equal(first[key], value) for key, value in again.state_dict().items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("mode=frozen", "mixing.name=mixup"), "mixing.name=mixup changes training images"),
        (("mode=frozen", "consistency.weight=1", "head.name=multiscale"), "consistency.weight needs a network"),
        (("mode=full", "consistency.weight=1"), "head.name=linear has none"),
        (("mode=frozen", "loss.name=focal"), "logistic regression"),
    ],
)
def test_what_a_mode_cannot_do_is_told(words, said):
    with pytest.raises(CarinaError, match=said):
        recipe(*words)


def test_a_label_of_one_class_is_told_before_the_training(rows):
    selection, targets = rows
    always = np.ones_like(targets[:, :1])
    given = recipe("mode=full", f"labels={[*LABELS, 'Always']}")
    found = task(given, (selection, np.concatenate([targets, always], axis=1)))
    assert [note.partition(":")[0] for note in found.notes] == ["Always"] and "one class only" in found.notes[0]
    assert not task(recipe("mode=full"), rows).notes
