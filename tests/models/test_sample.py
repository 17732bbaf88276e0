"""The trained sample model: its folder, its data, and that it answers."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from deepstitch.models import ops
from deepstitch.models.sample import fast_ops
from deepstitch.models.sample.demo import PICTURES
from deepstitch.models.sample.evaluate import EPISODES, evaluate, load_sample
from deepstitch.models.sample.files import CHECKPOINT, new_model, write_checkpoint
from deepstitch.models.sample.forward import run
from deepstitch.models.sample.generator import HELD_OUT, KINDS, TRAIN, episode_seed, make_episode
from deepstitch.models.sample.optimizer import build_optimizers
from deepstitch.models.sample.packing import pack
from deepstitch.models.sample.schedule import MemoryPlan, batch_bytes, micro_batch, shares
from deepstitch.models.sample.tokenizer import build_tokenizer, model_config
from deepstitch.models.sample.train import Checkpointing, Trainer
from deepstitch.models.sample.words import vocabulary

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return load_sample()


def test_folder_is_small():
    shipped = [*CHECKPOINT.iterdir(), *PICTURES.iterdir()]
    assert sum(file.stat().st_size for file in shipped) <= 8_000_000
    assert model_config()["text_config"]["num_experts"] >= 8
    assert model_config()["text_config"]["num_experts_per_tok"] == 2


def test_parameters_fit_the_budget(model):
    assert sum(parameter.numel() for parameter in model.parameters()) <= 3_600_000


def test_shipped_files_come_from_the_code(tmp_path):
    write_checkpoint(new_model(), tmp_path / "checkpoint")
    for file in (tmp_path / "checkpoint").iterdir():
        if file.name != "model.safetensors":
            assert (CHECKPOINT / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("kind", KINDS)
def test_episodes_are_deterministic(kind):
    first, second = make_episode(HELD_OUT, kind, 3), make_episode(HELD_OUT, kind, 3)
    assert first.questions == second.questions
    for one, other in zip(first.pixels(), second.pixels(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert make_episode(HELD_OUT, kind, 4).questions != first.questions


def test_training_and_held_out_seeds_never_meet():
    last = (1 << 40) - 1
    held_out = [(episode_seed(HELD_OUT, kind, 0), episode_seed(HELD_OUT, kind, last)) for kind in KINDS]
    train = [(episode_seed(TRAIN, kind, 0), episode_seed(TRAIN, kind, last)) for kind in KINDS]
    ranges = sorted(held_out + train)
    assert all(earlier[1] < later[0] for earlier, later in pairwise(ranges))
    with pytest.raises(ValueError, match="2\\*\\*40"):
        episode_seed(TRAIN, "one", last + 1)


def test_answers_fit_the_pictures():
    for index in range(40):
        episode = make_episode(HELD_OUT, "one", index)
        (picture,) = episode.pictures
        for question in episode.questions:
            if question.text == "How many shapes are there?":
                assert question.answer == str(len(picture.things))
            if question.task == "shape":
                color = question.text.split()[-1].rstrip("?")
                assert [thing.shape for thing in picture.things if thing.color == color] == [question.answer]


def test_every_word_is_one_token_and_any_text_survives():
    tokenizer = build_tokenizer()
    for word in vocabulary():
        if len(word) > 1:
            assert len(tokenizer.encode(word).ids) == len(tokenizer.encode(f" {word}").ids) == 1, word
    for text in ("naïve 漢字 🙂\n\ttabs", "AB12 <b>", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def _rendered(episode, question) -> str:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = ImmutableSandboxedEnvironment().from_string((CHECKPOINT / "chat_template.jinja").read_text())
    parts = [*episode.prefix, question.text]
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
    text = template.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)
    for picture in episode.pictures:
        text = text.replace("<|image_pad|>", "<|pad|>" * (picture.height * picture.width // 1024), 1)
    return text.replace("<|pad|>", "<|image_pad|>")


@pytest.mark.parametrize("kind", ["one", "several", "album", "text", "recall"])
def test_training_prompts_are_what_the_chat_template_renders(kind):
    tokenizer = build_tokenizer()
    for index in range(4):
        episode = make_episode(HELD_OUT, kind, index)
        batch = pack([episode])
        for number, question in enumerate(episode.questions):
            prompt = tokenizer.encode(_rendered(episode, question)).ids
            answer = tokenizer.encode(question.answer + "<|im_end|>").ids
            own = (batch.segments[0] == 0) | (batch.segments[0] == number + 1)
            assert batch.input_ids[0][own].tolist() == prompt + answer[:-1]
            assert batch.targets[batch.questions == number].tolist() == answer


def test_packed_questions_do_not_see_each_other(model):
    episode = make_episode(HELD_OUT, "several", 1)
    with torch.no_grad():
        together = run(model, pack([episode])).logits
        alone = []
        for question in episode.questions:
            single = type(episode)(prefix=episode.prefix, questions=(question,), seed=episode.seed)
            alone.append(run(model, pack([single])).logits)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


def test_fast_operators_equal_the_definitions():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, requires_grad=True)

    cases = [
        (fast_ops.rms_norm, ops.rms_norm, (draw(2, 5, 16), draw(16)), (1e-6,)),
        (
            fast_ops.moe_experts,
            ops.moe_experts,
            (draw(2, 9, 16), draw(2, 9, 4), draw(4, 16, 12), draw(4, 6, 16)),
            (2, True),
        ),
    ]
    for fast, slow, inputs, rest in cases:
        results = [function(*inputs, *rest) for function in (fast, slow)]
        torch.testing.assert_close(*results)
        weights = torch.randn(results[0].shape, generator=generator)
        gradients = [torch.autograd.grad((result * weights).sum(), inputs) for result in results]
        torch.testing.assert_close(*gradients)


def test_micro_batches_respect_the_memory_limit():
    plan = MemoryPlan(limit_bytes=100_000_000, step_bytes=150_000_000)
    for number in range(12):
        batch, _ = micro_batch(plan, {"one": 0.5, "several": 0.4, "text": 0.1}, number, 0)
        assert batch_bytes(batch) < 1.4 * plan.limit_bytes
    assert sum(shares(0.0).values()) == pytest.approx(1)
    assert sum(shares(1.0).values()) == pytest.approx(1)


def test_recomputed_layers_give_the_same_gradients():
    torch.manual_seed(0)
    model = new_model()
    switch, batch = Checkpointing(model), pack([make_episode(TRAIN, "one", 0)])
    norms = []
    for switch.active in (False, True):
        model.zero_grad()
        run(model, batch).logits.logsumexp(-1).sum().backward()
        norms.append(torch.stack([parameter.grad.norm() for parameter in model.parameters()]))
    torch.testing.assert_close(*norms)


def test_training_runs_and_resumes(tmp_path):
    plan = MemoryPlan(limit_bytes=20_000_000, step_bytes=30_000_000)
    trainer = Trainer(tmp_path, 60.0, plan, processes=1, always_checkpoint=True)
    before = trainer.model.lm_head.weight.clone()
    optimizers = build_optimizers(trainer.model, trainer.probe, rank=0, size=1)
    with fast_ops.enabled():
        loss = trainer.train_step(0, optimizers, warmup=1.0)
    assert 0 < loss < 20
    assert not torch.equal(before, trainer.model.lm_head.weight)
    trainer.save()
    resumed = Trainer(tmp_path, 60.0, plan, processes=1, always_checkpoint=True)
    resumed.resume(tmp_path / "state.pt")
    assert resumed.step == 1
    assert torch.equal(resumed.model.lm_head.weight, trainer.model.lm_head.weight)
    assert len(load_sample(tmp_path / "checkpoint").state_dict()) == len(trainer.model.state_dict())


def test_answers_held_out_questions_and_needs_deepstack(model):
    scale = {"one": 8, "several": 4, "album": 1, "text": 1, "recall": 2}
    report = evaluate(model, episodes={kind: scale.get(kind, 0) for kind in EPISODES})
    assert report.total.questions >= 60
    assert report.accuracy >= 0.9
    assert report.accuracy_without_deepstack <= report.accuracy - 0.1
    assert all(share > 0 for layer in report.expert_share for share in layer)


def test_example_pictures_have_right_answers(model):
    from deepstitch.models.sample.demo import example_episodes

    entries = json.loads((PICTURES / "questions.json").read_text())
    assert len(entries) == len(list(PICTURES.glob("*.png"))) == 6
    for entry, (episode, question) in zip(entries, example_episodes(), strict=True):
        assert (entry["question"], entry["answer"]) == (question.text, question.answer)
        np.testing.assert_array_equal(np.asarray(Image.open(PICTURES / entry["image"])), episode.pixels()[0])
