"""align.py's PPO and GRPO: advantages and losses by hand, against trl's, bandits with known optima, faults, kills."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command, prepare, records, refusal, wait_for
from safetensors.torch import load_file, save_file

import align
from align import Answer, GRPOStage, PPOStage, group_advantages
from model import (
    Config, Run, Transformer, UserError, load_model, load_tokenizer, render, resumed, save_checkpoint,
)  # fmt: skip

SMALL = {"max_steps": 4, "batch_size": 4, "warmup_steps": 1, "eval_interval": 2, "save_interval": 1, "dtype": "fp32",
         "max_new_tokens": 8, "device": "cpu"}  # fmt: skip
KINDS = {"grpo": GRPOStage, "ppo": PPOStage}


def options(kind, base, lines, out, **more):
    """Build a stage's options; settings without an option go where --set puts them."""
    settings = [f"{name}={more.pop(name)}" for name in SETTINGS & more.keys()]
    files = {"model": str(base), "data": [str(lines / "prompts.jsonl")], "out": str(out)}
    return KINDS[kind](**{**SMALL, **files, **more}, set=settings)


SETTINGS = {"passes", "minibatches", "gamma", "lam", "value_clip", "entropy_coef"}


def stage(*args, **more):
    """Run a stage in this process."""
    return align.run_stage(options(*args, **more))


def open_learner(*args, **more):
    """Open what a step needs, and do none."""
    o = options(*args, **more)
    return align.METHODS[o.command](o)


def typed(name, base, lines, out, *more, **kw):
    """Run a stage as a user would."""
    small = [w for k, v in SMALL.items() for w in (f"--{k.replace('_', '-')}", v)]
    given = ["--model", base, "--data", lines / "prompts.jsonl", "--out", out, *small, *more]
    return command("align.py", name, *given, **kw)


def group_of(learner, texts, rewards):
    """A group of answers to the first prompt, as if the policy had written them."""
    task, tokenizer = learner.items[0], learner.tokenizer
    prompt = render(tokenizer, task["prompt"], reply=True)[0]
    every = [(t, [*tokenizer.encode(t), tokenizer.im_end_id], r) for t, r in zip(texts, rewards, strict=True)]
    return [Answer(task, prompt, ids, text, True, reward) for text, ids, reward in every]


def items_of(learner, *groups):
    """The items of groups, with credit for each token, and what was logged of that."""
    items = learner.observe([group_of(learner, *group) for group in groups])
    return items, learner.credit(items)


def rewarded(monkeypatch, reward):
    """Let reward(answers) stand in the place of the checks."""
    monkeypatch.setattr(align, "Reward", lambda *args: Fake(reward))


class Fake:
    fingerprint = []

    def __init__(self, reward):
        self.reward = reward

    def __call__(self, answers):
        return self.reward(answers)


def answer(task, text, ended=True):
    return Answer(task, [2], [1], text, ended)


TEXTS, REWARDS = ["    return a", "    pass", "    x = a + 1\n    return x", ""], [1.0, 0.0, 0.5, 0.25]


# Advantages and losses -----------------------------------------------------------------------------------------------


def test_gae_is_the_recursion():
    rewards, values = [0.1, -0.2, 0.3, 1.0], [0.5, 0.4, 0.8, 0.6]
    gamma, lam = 0.9, 0.7
    after = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, v, n in zip(rewards, values, after, strict=True)]
    want = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, 4)) for t in range(4)]
    assert align.gae(rewards, values, gamma, lam) == pytest.approx(want)
    returns = [sum(gamma ** (k - t) * rewards[k] for k in range(t, 4)) for t in range(4)]
    assert align.gae(rewards, values, gamma, 1.0) == pytest.approx([r - v for r, v in zip(returns, values, strict=True)])
    assert align.gae(rewards, values, gamma, 0.0) == pytest.approx(deltas)


def test_the_clips_act_when_they_should():
    """Beyond the bound in the direction it was pushed in a token has no gradient; on the way back it has."""
    for log_ratio, advantage, live in ((0.0, 1, True), (0.5, 1, False), (0.5, -1, True), (-0.5, -1, False), (-0.5, 1, True)):
        x = torch.tensor([log_ratio], requires_grad=True)
        align.clipped_loss(x, torch.tensor([float(advantage)])).backward()
        assert (x.grad.abs().item() > 0) == live
    x = torch.tensor([math.log(1.25)], requires_grad=True)
    align.clipped_loss(x, torch.ones(1), 0.2, 0.28).backward()
    assert x.grad.item() == pytest.approx(-1.25)  # clip-higher lets it go on
    for value, target, live in ((0.1, 1.0, True), (0.5, 1.0, False), (0.5, 0.0, True), (-0.5, -1.0, False)):
        v = torch.tensor([value], requires_grad=True)
        align.value_loss(v, torch.zeros(1), torch.tensor([target]), 0.2).backward()
        assert (v.grad.abs().item() > 0) == live
    moved = align.value_loss(torch.tensor([1.5]), torch.tensor([1.0]), torch.tensor([2.0]), 0.2)
    assert moved.item() == pytest.approx(0.8**2 / 2)  # counted from its old value


def test_group_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    assert group_advantages(rewards, False).tolist() == [[0.75, -0.25, -0.25, -0.25], [0.0] * 4]
    scaled = group_advantages(rewards)
    assert scaled[0].std().item() == pytest.approx(1, abs=1e-3) and scaled[1].tolist() == [0.0] * 4


def test_kl_estimates_agree_with_the_sum():
    p, q = (torch.randn(50, generator=torch.Generator().manual_seed(i)).log_softmax(-1) for i in (1, 2))
    exact = (p.exp() * (p - q)).sum()
    assert (p.exp() * align.kl_estimate(q - p)).sum().item() == pytest.approx(exact.item(), rel=1e-5)
    assert (align.kl_estimate(q - p) >= 0).all()
    assert align.next_kl_coef(0.1, 12.0, 6.0) == pytest.approx(0.102) and align.next_kl_coef(0.1, 5.4, 6.0) == pytest.approx(0.099)


def test_pass_at_k():
    """The estimator is the mean over all subsets."""
    from itertools import combinations

    right = [1, 0, 0, 1, 0]
    for k in range(1, 6):
        every = [max(s) for s in combinations(right, k)]
        assert align.pass_at_k(5, 2, k) == pytest.approx(sum(every) / len(every))


@pytest.mark.parametrize("kind, more", [
    ("grpo", {"normalize": "token"}), ("grpo", {"normalize": "sequence", "temperature": 0.7}),
    ("ppo", {"value_coef": 0.0}),
])  # fmt: skip
def test_the_first_gradient_is_the_policy_gradients(kind, more, base, lines, tmp_path):
    """At ratio 1 the gradient of the clipped objective is that of -A log p, over answers' tokens only."""
    learner = open_learner(kind, base, lines, tmp_path / "o", kl_coef=0.0, **more)
    (item,), _ = items_of(learner, (TEXTS, REWARDS))
    learner.measure([item], scale=1.0)
    found = {n: p.grad for n, p in learner.model.named_parameters() if p.grad is not None}
    plain, total = load_model(base), 0.0
    lengths = [sum(e.trained) for e in item.examples]
    old, advantages = item.facts["logp"].split(lengths), item.facts["advantages"].split(lengths)
    for i, (e, text, length) in enumerate(zip(item.examples, TEXTS, lengths, strict=True)):
        answer = learner.tokenizer.decode([t for t, own in zip(*e, strict=True) if own])
        assert answer == text + "<|im_end|>"
        logits = plain(torch.tensor([e.ids]))[0][0] / more.get("temperature", 1.0)
        logp = logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(e.ids[1:])[:, None])[:, 0][-length:]
        torch.testing.assert_close(old[i], logp.detach(), rtol=1e-4, atol=1e-4)
        share = 4 * length if more.get("normalize") == "sequence" else sum(lengths)
        total = total - (advantages[i] * logp).sum() / share
    total.backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)


def test_grpo_begins_at_zero_and_ppo_at_its_critic(base, lines, tmp_path):
    learner = open_learner("grpo", base, lines, tmp_path / "g", normalize="sequence")
    items, _ = items_of(learner, (TEXTS, REWARDS))
    metrics = learner.measure(items)
    assert metrics["loss"] == pytest.approx(0, abs=1e-6) and metrics["clip_fraction"] == 0
    learner = open_learner("grpo", base, lines, tmp_path / "t", normalize="token")
    items, _ = items_of(learner, (TEXTS, REWARDS))
    lengths = torch.tensor([sum(e.trained) for e in items[0].examples])
    want = -(group_advantages(torch.tensor(REWARDS)) * lengths).sum() / lengths.sum()
    assert abs(want) > 0.01 and learner.measure(items)["loss"] == pytest.approx(want.item(), abs=1e-5)
    learner = open_learner("ppo", base, lines, tmp_path / "p")
    items, logged = items_of(learner, (TEXTS, REWARDS))
    facts = items[0].facts
    assert (facts["values"] == 0).all() and logged["kl_coef"] == 0.005
    assert align.distance(items)["kl"] == pytest.approx(0, abs=1e-6)
    lengths = [sum(e.trained) for e in items[0].examples]
    for returns, reward in zip(facts["returns"].split(lengths), REWARDS, strict=True):
        # no critic yet, gamma 1: lambda to the way that is left
        want = reward * 0.95 ** torch.arange(len(returns) - 1, -1, -1.0)
        torch.testing.assert_close(returns, want, rtol=1e-4, atol=1e-5)
    assert facts["advantages"].mean().abs() < 1e-5 and facts["advantages"].std().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
@pytest.mark.parametrize("minibatches", [1, 3])
def test_the_first_ratio_is_one(kind, minibatches, base, lines, tmp_path, monkeypatch):
    """The policy that is trained is the one that wrote: before a step's first update all ratios are 1."""
    rewarded(monkeypatch, lambda answers: [float(i % 3) for i in range(len(answers))])
    ratios, loss = [], align.clipped_loss
    monkeypatch.setattr(align, "clipped_loss", lambda x, *more: ratios.append(x.detach().abs().max().item()) or loss(x, *more))
    stage(kind, base, lines, tmp_path / "o", samples=4, max_steps=2, minibatches=minibatches, lr=1e-2)
    first = ratios[::minibatches]
    assert len(first) == 2 and (first == [0.0, 0.0] if minibatches == 1 else max(first) < 2e-6)
    assert minibatches == 1 or min(ratios[1:3]) > 1e-5  # and after it they are not


def test_grpo_pays_for_the_kl(base, lines, tmp_path):
    """Its estimate is of KL(policy || reference): r - 1 - log r of r = p_ref / p, the mean over the tokens."""
    learner = open_learner("grpo", base, lines, tmp_path / "o")
    with torch.no_grad():
        for p in learner.model.parameters():
            p.mul_(1.05)
    items, _ = items_of(learner, (TEXTS, REWARDS))
    log_ratio = items[0].facts["reference"] - items[0].facts["logp"]
    want, other = ((x.exp() - 1 - x).mean().item() for x in (log_ratio, -log_ratio))
    assert learner.measure(items)["kl_loss"] == pytest.approx(want, rel=1e-4) != pytest.approx(other, rel=1e-3)


def test_ppo_pays_for_the_kl(base, lines, tmp_path):
    """With lambda 1 a token's return is the answer's reward less the price of the KL from there on."""
    learner = open_learner("ppo", base, lines, tmp_path / "o", kl_coef=0.5, lam=1.0)
    with torch.no_grad():
        for p in learner.model.parameters():
            p.mul_(1.05)
    items, _ = items_of(learner, (TEXTS, REWARDS))
    facts, lengths = items[0].facts, items[0].lengths
    kls = (facts["logp"] - facts["reference"]).split(lengths)
    assert max(kl.abs().max() for kl in kls) > 1e-3
    for returns, kl, reward in zip(facts["returns"].split(lengths), kls, REWARDS, strict=True):
        torch.testing.assert_close(returns, reward - 0.5 * kl.flip(0).cumsum(0).flip(0), rtol=1e-4, atol=1e-5)


def test_the_critic_reads_the_policy_alone(base, lines, tmp_path, monkeypatch):
    learner = open_learner("ppo", base, lines, tmp_path / "o")
    with torch.no_grad():
        for p in learner.model.parameters():
            p.add_(0.01)
    seen = []
    learner.model.critic.register_forward_hook(lambda module, args, out: seen.append(out))
    items, _ = items_of(learner, (TEXTS, REWARDS))
    assert len(seen) == 1 and torch.equal(seen[0][:, 0], items[0].facts["values"])
    assert not torch.allclose(items[0].facts["logp"], items[0].facts["reference"])


def test_flat_groups(base, lines, tmp_path):
    """A group without variance teaches GRPO nothing, and is left out; PPO learns from a lone answer, too."""
    learner = open_learner("grpo", base, lines, tmp_path / "o", kl_coef=0.0)
    items, _ = items_of(learner, (TEXTS, REWARDS), (TEXTS, [0.5] * 4))
    assert len(items) == 1 and len(items[0].examples) == 4
    learner = open_learner("ppo", base, lines, tmp_path / "p")
    assert len(items_of(learner, (TEXTS, [0.5] * 4), (TEXTS[:1], [1.0]))[0]) == 2


@pytest.mark.parametrize(
    "kind, option",
    [("grpo", {"clip": 0.01}), ("grpo", {"clip_high": 0.01}), ("grpo", {"scale": "none"}), ("grpo", {"kl_coef": 0.5}),
     ("ppo", {"clip_high": 0.01}), ("grpo", {"normalize": "sequence"}), ("grpo", {"normalize": "constant"}), ("grpo", {"temperature": 0.5}),
     ("ppo", {"clip": 0.01}), ("ppo", {"gamma": 0.9}), ("ppo", {"lam": 0.5}), ("ppo", {"kl_coef": 0.5}), ("ppo", {"value_coef": 0.5}),
     ("ppo", {"value_clip": 0.01}), ("ppo", {"entropy_coef": 0.1}), ("ppo", {"temperature": 0.5})],
)  # fmt: skip
def test_every_option_changes_the_loss(kind, option, base, lines, tmp_path):
    """With a policy that is neither the reference (so there is a KL) nor what played (a ratio), and a critic that has values."""
    losses = []
    for more in ({}, option):
        learner = open_learner(kind, base, lines, tmp_path / "o", **more)
        with torch.no_grad():
            for name, p in learner.model.named_parameters():
                p.mul_(1.02) if "critic" not in name else p.add_(0.05)
        items, _ = items_of(learner, (TEXTS, REWARDS))
        with torch.no_grad():
            for p in learner.model.parameters():
                p.mul_(1.04)
        losses.append(learner.measure(items)["loss"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)


def test_entropy_is_worth_something(base, lines, tmp_path):
    """The loss is the one without, less the coefficient times the mean entropy of the answers' tokens."""
    losses = []
    for coef in (0.0, 0.1):
        learner = open_learner("ppo", base, lines, tmp_path / "o", entropy_coef=coef)
        items, _ = items_of(learner, (TEXTS, REWARDS))
        losses.append(learner.measure(items)["loss"])
    entropies = []
    for e in items[0].examples:
        asked = [i - 1 for i in range(len(e.ids)) if e.trained[i]]
        p = load_model(base)(torch.tensor([e.ids]))[0][0, asked].log_softmax(-1)
        entropies.append(-(p.exp() * p).sum(-1))
    assert losses[0] - losses[1] == pytest.approx(0.1 * torch.cat(entropies).mean().item(), rel=1e-4)


def test_passes_and_minibatches_are_updates(base, lines, tmp_path, monkeypatch):
    """Three epochs of two: six updates of a step, which the log shows as one."""
    rewarded(monkeypatch, lambda answers: [float(i % 3) for i in range(len(answers))])
    updates, update = [], Run.update
    monkeypatch.setattr(Run, "update", lambda run, *args, **more: updates.append(run.at) or update(run, *args, **more))
    stage("grpo", base, lines, tmp_path / "o", inner_epochs=3, minibatches=2, samples=4, max_steps=2)
    assert updates == [0] * 6 + [1] * 6
    assert [r["step"] for r in records(tmp_path / "o") if "loss" in r] == [1, 2]


# Bandits: answers of one token, and arms that many tokens share ---------------------------------------------------------


def play_bandit(kind, base, lines, out, reward, steps, monkeypatch, **more):
    """Play with the first prompt -> the probabilities that tokens are drawn with, before and after. Rows of the vocabulary
    beyond the tokenizer's are never drawn: rewards say nothing of their share, which drifts."""
    rewarded(monkeypatch, lambda answers: [reward(a.ids[0]) for a in answers])
    first = (lines / "prompts.jsonl").read_text().splitlines()[0]
    (out / "prompts.jsonl").write_text(first + "\n")
    more = {"max_steps": steps, "max_new_tokens": 1, "lr": 3e-3, "schedule": "cosine", "minibatches": 1, **more}
    stage(kind, base, out, out / "o", eval_interval=10**6, save_interval=10**6, **more)
    tokenizer = load_tokenizer(base)
    prompt = render(tokenizer, [{"role": "user", "content": json.loads(first)["prompt"]}], reply=True)[0]
    logits = [load_model(folder)(torch.tensor([prompt]))[0][0, -1].detach() for folder in (base, out / "o")]
    return [row[: tokenizer.n_vocab].softmax(-1) for row in logits]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_ten_arms(kind, base, lines, tmp_path, monkeypatch):
    """The best of ten is found, with payouts that are close."""
    pay = [0.1, 0.5, 0.2, 0.9, 0.3, 0.7, 0.0, 0.4, 0.6, 0.8]
    size = {"batch_size": 4, "samples": 16} if kind == "grpo" else {"batch_size": 64, "samples": 1, "inner_epochs": 2}
    steps = 250 if kind == "grpo" else 100
    size |= {"kl_coef": 0.0}
    _, after = play_bandit(kind, base, lines, tmp_path, lambda token: pay[token % 10], steps, monkeypatch, **size)
    assert after[3::10].sum() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_two_arms_with_kl(kind, base, lines, tmp_path, monkeypatch):
    """Even tokens pay 1. PPO's KL, in the reward, is KL(p || ref), and its optimum p ~ ref e^(r/b); GRPO's, in the loss, has the
    gradient of KL(ref || p), and the optimum p = b ref / (c - r), with r a (n-1)/n of itself, the mean being its own."""
    b, n = 0.5, 16
    size = {"batch_size": 8, "samples": n, "scale": "none"} if kind == "grpo" else {"batch_size": 128, "samples": 1, "inner_epochs": 1}
    steps = 300 if kind == "grpo" else 220
    size |= {"kl_coef": b}
    before, after = play_bandit(kind, base, lines, tmp_path, lambda t: 1.0 - t % 2, steps, monkeypatch, **size)
    even = before[0::2].sum().item()
    if kind == "ppo":
        want = even * math.exp(1 / b) / (even * math.exp(1 / b) + 1 - even)
    else:
        r = (n - 1) / n
        low, high = r + 1e-9, r + 10
        for _ in range(100):  # sum to one
            c = (low + high) / 2
            low, high = (c, high) if b * even / (c - r) + b * (1 - even) / c > 1 else (low, c)
        want = b * even / (c - r)
    assert after[0::2].sum().item() == pytest.approx(want, abs=0.03)


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(tmp_path_factory, base, lines):
    """A reward model."""
    home = tmp_path_factory.mktemp("judge")
    files = {"model": str(base), "data": [str(lines / "pairs.jsonl")], "out": str(home / "r")}
    align.run_stage(align.RewardStage(**files, max_steps=3, batch_size=4, lr=1e-2, warmup_steps=0, dtype="fp32",
                                      device="cpu"))
    return home / "r"


@pytest.mark.slow
@pytest.mark.parametrize("name, more", [
    ("grpo", {}), ("ppo", {"kl_target": 3, "entropy_coef": 0.01}), ("ppo", {"lora_rank": 4}),
    ("grpo", {"lora_rank": 4, "optimizer": "muon"}),
])  # fmt: skip
def test_resume_is_exact(name, more, base, lines, tmp_path):
    more = {"schedule": "constant", **more}
    stage(name, base, lines, tmp_path / "whole", **more)
    stage(name, base, lines, tmp_path / "part", **more, **{"max_steps": 2})
    align.run_stage(resumed(KINDS[name], tmp_path / "part", max_steps=4))
    whole, part = (load_model(tmp_path / f).state_dict() for f in ("whole", "part"))
    assert all(torch.equal(whole[n], part[n]) for n in whole) and not any(n.startswith("critic") for n in whole)
    assert any(not torch.equal(whole[n], w) for n, w in load_model(base).state_dict().items())
    times = {"seconds", "ms_per_step", "tok_per_s", "rollout_share"}
    one, two = ([{k: v for k, v in r.items() if k not in times} for r in records(tmp_path / f) if "reward" in r]
                for f in ("whole", "part"))  # fmt: skip
    assert one == two and len(one) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_kills(name, base, lines, tmp_path):
    more = ("--max-steps", "100", "--save-interval", "2")
    stage(name, base, lines, tmp_path / "whole", max_steps=100, save_interval=2)
    once = tmp_path / "part" / "config.json"
    code, _, _ = typed(name, base, lines, tmp_path / "part", *more, kill_after=0.7, once=once)
    assert code != 0
    kills = 0
    while code != 0:
        wait_for(tmp_path / "part" / "config.json")
        limit = 4 + kills if kills < 4 else None
        code, _, err = command("align.py", name, "--resume", tmp_path / "part", kill_after=limit)
        kills += 1
        if "is finished" in err:  # killed after its last save
            break
        assert kills < 9, err
    whole, part = (load_model(tmp_path / f).state_dict() for f in ("whole", "part"))
    assert all(torch.equal(whole[n], part[n]) for n in whole)


RANKS = """
import os
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_play
test_play.play_alike({base!r}, {out!r})
sys.stderr.flush()
os._exit(0)  # as model.run_app leaves: on Python's own way out gloo now and then aborts
"""


def play_alike(base, out):
    """Run GRPO and PPO on answers that are the same whoever is asked for them, and leave the weights in a file."""
    texts = ["    return a", "    pass", "    x = a + 1", "", "a", "    return None"]

    def write_answers(model, tokenizer, tasks, samples, *args):
        prompts = [render(tokenizer, task["prompt"], reply=True)[0] for task in tasks]
        groups = []
        for task, prompt in zip(tasks, prompts, strict=True):
            some = [texts[(sum(prompt) + i) % len(texts)] for i in range(samples)]
            groups.append([Answer(task, prompt, [*tokenizer.encode(t), tokenizer.im_end_id], t, True) for t in some])
        return groups

    align.write_answers = write_answers
    align.Reward = lambda *args: Fake(lambda answers: [float(len(a.ids) % 3) for a in answers])
    for name, kind in list(align.METHODS.items())[-2:]:
        learners = []
        align.METHODS[name] = lambda o, kind=kind, learners=learners: learners.append(kind(o)) or learners[0]
        stage(name, base, Path(out).parent, f"{out}-{name}", samples=4, max_steps=2, lr=1e-3)
        sums = torch.cat([p.detach().flatten() for p in learners[0].model.parameters()])
        torch.save(sums, f"{out}-{name}.{learners[0].ranks.rank}")


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(base, lines, tmp_path):
    """Of the same answers, shared out: the weights are one process's, and both ranks have them."""
    shutil.copy(lines / "prompts.jsonl", tmp_path)
    for ranks in (1, 2):
        names = {"root": str(ROOT), "tests": str(ROOT / "tests"), "base": str(base), "out": str(tmp_path / str(ranks))}
        (tmp_path / "play.py").write_text(RANKS.format(**names))
        code, _, err = command(tmp_path / "play.py", ranks=ranks)
        assert code == 0, err
    start = torch.cat([p.detach().flatten() for p in load_model(base).parameters()])
    for name in KINDS:
        one, two, other = (torch.load(tmp_path / f"{ranks}-{name}.{rank}") for ranks, rank in ((1, 0), (2, 0), (2, 1)))
        assert (one[: len(start)] - start).abs().max() > 1e-4
        assert torch.equal(two, other)
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_two_ranks_play(base, lines, judge, tmp_path):
    """Each draws its share of the answers, and has them scored."""
    more = ("--samples", "4", "--max-steps", "2", "--reward", judge)
    code, _, err = typed("ppo", base, lines, tmp_path / "o", *more, ranks=2)
    assert code == 0, err
    rows = [r for r in records(tmp_path / "o") if "reward" in r]
    assert len(rows) == 2 and all(math.isfinite(r["loss"]) and r["distinct"] > 0.5 and r["reward_std"] > 0 for r in rows)


def test_what_is_logged(base, lines, judge, tmp_path):
    """Rewards are summed by weight; a reward model reads text."""
    stage("ppo", base, lines, tmp_path / "o", reward=[f"{judge}:0.5", "checks", "parses:2"], kl_target=3)
    rows = records(tmp_path / "o")
    step = next(r for r in rows if "reward" in r)
    assert {"reward", "reward_std", "passes", "kl", "kl_answer", "kl_coef", "entropy", "length", "ended", "distinct", "flat", "clip_fraction",
            "explained_variance", "rollout_share", "grad_norm", "value_loss", "policy_loss"} <= step.keys()  # fmt: skip
    coefs = [r["kl_coef"] for r in rows if "kl_coef" in r]
    assert coefs[0] == 0.005 and all(b < a for a, b in zip(coefs, coefs[1:], strict=False))  # near the reference: ever cheaper
    task = align.load_prompts(lines / "prompts.jsonl")[0]
    answers = [answer(task, "    return a + 1"), answer(task, "    pass"), answer(task, "    pass", False)]
    rewards = align.Reward(["checks", "parses:2"], 1.0, "cpu")(answers)
    shares = [sum(a.grades.values()) / len(align.CHECKS) for a in answers]
    assert shares[0] == 1 > shares[1] > shares[2] and rewards == pytest.approx([1 + 2, shares[1] / 2 + 2, shares[2] / 2 + 2 - 1])
    scored = align.Reward([f"{judge}:0.5"], 0.0, "cpu")(answers)
    assert scored[1] == pytest.approx(scored[2], rel=1e-4) and scored[0] != pytest.approx(scored[1], rel=1e-3)
    assert scored[0] == pytest.approx(align.Reward([str(judge)], 0.0, "cpu")(answers[:1])[0] / 2)


def test_a_judge_with_another_tokenizer(base, lines, text, tmp_path, capsys):
    """It is given text, which it reads with its own; of what is longer than its context it reads the end, and says so."""
    other = prepare(tmp_path / "other", text, "--vocab-size", "300", "--val-fraction", "0.1")
    tokenizer = load_tokenizer(other)
    config = Config(vocab_size=tokenizer.n_vocab, seq_len=96, n_layer=1, n_head=2, n_kv_head=2, n_embd=32, head_dim=16, ffn_dim=64,
                    head="score", eos_id=tokenizer.eot_id, pad_id=tokenizer.pad_id)  # fmt: skip
    model = Transformer(config).init_weights(3)
    torch.nn.init.normal_(model.score.weight)
    save_checkpoint(tmp_path / "judge", model, other / "tokenizer.json")
    talk = [{"role": "user", "content": "def f(a):"}, {"role": "assistant", "content": "    return a"}]
    ids = render(tokenizer, talk)[0]
    assert ids != render(load_tokenizer(base), talk)[0]
    long = [talk[0], {**talk[1], "content": "Qx7~" * 40}]
    judge = align.Reward([str(tmp_path / "judge")], 0.0, "cpu")
    said, longer = (answer({"prompt": t[:1], "check": None}, t[1]["content"]) for t in (talk, long))
    assert "judge reads the last 96 tokens of a conversation" in " ".join(capsys.readouterr().err.split())
    scores, last = judge([said, longer, said]), render(tokenizer, long)[0][-96:]
    want = [model(torch.tensor([x]))[0][0, -1].item() for x in (ids, last, ids)]
    assert len(last) == 96 and scores == pytest.approx(want, rel=1e-4) and want[0] != pytest.approx(want[1], rel=1e-3)
    stage("grpo", base, lines, tmp_path / "o", reward=[str(tmp_path / "judge")], max_steps=2)
    rows = [r for r in records(tmp_path / "o") if "reward" in r]
    assert len(rows) == 2 and all(math.isfinite(r["reward"]) for r in rows)


def test_a_changed_judge_is_refused(base, lines, tmp_path):
    model = load_model(base)
    for seed in (0, 1):
        judge = align.rebuild(model, head="score")
        torch.nn.init.normal_(judge.score.weight, generator=torch.Generator().manual_seed(seed))
        save_checkpoint(tmp_path / "judge", judge, base / "tokenizer.json")
        if seed == 0:
            stage("grpo", base, lines, tmp_path / "o", reward=[str(tmp_path / "judge")], max_steps=1)
    with pytest.raises(UserError, match="--reward is not what"):
        align.run_stage(resumed(GRPOStage, tmp_path / "o", max_steps=2))


def test_several_answers(base, lines, monkeypatch):
    """pass@k and the reward model's choice, by hand: of four answers to each of two prompts."""
    tasks = align.load_prompts(lines / "prompts.jsonl")[:2]
    texts = ["    return a + 1", "    pass", "    return 1 + a", "x"]
    groups = [[answer(tasks[0], t) for t in texts]]
    groups += [[answer(tasks[1], t) for t in ("    pass", "    pass", "    return a * 2", "    ...")]]
    liked = {"    return a + 1": 1.0, "    pass": 2.0, "    return a * 2": 3.0}
    monkeypatch.setattr(align, "answer_all", lambda *args, **more: groups)
    rewarded(monkeypatch, lambda answers: [liked.get(a.text, 0.0) for a in answers])
    found = {k: v[0] for k, v in align.assess(base, tasks, reward="judge", device="cpu", samples=4).items()}
    assert found["pass@1"] == pytest.approx((2 / 4 + 1 / 4) / 2) and found["pass@4"] == 1.0
    assert found["pass@2"] == pytest.approx((5 / 6 + 3 / 6) / 2) and "pass@3" not in found
    assert found["passes: best of 4 by the reward model"] == 0.5  # `pass`, and `return a * 2`


def test_a_reward_that_is_no_number_is_refused(base, lines, judge, tmp_path):
    """A broken reward model ends the run in a sentence; what it holds is what it began with."""
    shutil.copytree(judge, tmp_path / "judge")
    weights = load_file(judge / "model.safetensors")
    save_file({n: w * math.nan for n, w in weights.items()}, tmp_path / "judge" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="A reward is not a number"):
        stage("grpo", base, lines, tmp_path / "o", reward=[str(tmp_path / "judge")])
    was, now = load_model(base).state_dict(), load_model(tmp_path / "o").state_dict()
    assert all(torch.equal(was[n], now[n]) for n in was)


def test_endless_answers_pay(base, lines, tmp_path):
    """Cut at --max-new-tokens, and --unended is taken off."""
    rewards = []
    for unended in (0, 5):
        out = tmp_path / str(unended)
        stage("grpo", base, lines, out, unended=unended, reward=["parses"], max_steps=1)
        rewards.append(next(r for r in records(out) if "reward" in r))
    one, two = rewards
    assert one["ended"] == two["ended"] < 1 and one["length"] <= 8
    assert one["reward"] - two["reward"] == pytest.approx(5 * (1 - one["ended"]), abs=1e-5)


def test_groups_of_equal_rewards_change_nothing(base, lines, tmp_path, monkeypatch):
    rewarded(monkeypatch, lambda answers: [1.0] * len(answers))
    stage("grpo", base, lines, tmp_path / "o", max_steps=2, lr=1.0)
    rows = [r for r in records(tmp_path / "o") if "flat" in r]
    assert [r["flat"] for r in rows] == [1.0, 1.0]
    was, now = load_model(base).state_dict(), load_model(tmp_path / "o").state_dict()
    assert all(torch.equal(was[n], now[n]) for n in was)


@pytest.mark.parametrize(
    "args, sentence",
    [
        (("grpo", "--samples", "1"), "--samples is 1; it has to be at least 2"),
        (("grpo", "--scale", "x"), "--scale is one of std, none"),
        (("grpo", "--normalize", "x"), "--normalize is one of token, sequence, constant"),
        (("ppo", "--set", "lam=2"), "gamma and lam lie between 0 and 1"),
        (("ppo", "--set", "minibatches=0"), "minibatches have to be at least 1"),
        (("ppo", "--set", "dropout=0.1"), "dropout: no setting of this stage"),
        (("ppo", "--clip", "0"), "--clip is 0.0; it has to be above 0"),
        (("ppo", "--clip", "1"), "--clip has to be below 1"),
        (("grpo", "--reward", "nowhere"), "holds no checkpoint"),
        (("grpo", "--reward", ""), "--reward '': write NAME"),
        (("grpo", "--reward", "checks:1e999"), "--reward 'checks:1e999': write NAME"),
        (("grpo", "--unended", "-1"), "--unended is -1.0; it has to be at least 0"),
        (("ppo", "--samples", "1", "--batch-size", "1"), "--batch-size times --samples is between 2 and a million"),
        (("grpo", "--reward", "BASE"), "is no reward model"),
        (("grpo", "--reward", "checks:1.2.3"), "holds no checkpoint"),
        (("grpo", "--kl-coef", "-1"), "--kl-coef is -1.0; it has to be at least 0"),
        (("grpo", "--clip-high", "-0.5"), "--clip-high is -0.5; it has to be above 0"),
        (("ppo", "--kl-coef", "0", "--kl-target", "3"), "--kl-target needs a --kl-coef above 0"),
        (("ppo", "--max-steps", "0"), "--max-steps is 0; it has to be at least 1"),
        (("grpo", "--model", "JUDGE"), "is a reward model"),
    ],
)
def test_sentences(args, sentence, base, judge, lines, tmp_path):
    args = [{"BASE": str(base), "JUDGE": str(judge)}.get(a, a) for a in args]
    small = ["--model", base, "--data", lines / "prompts.jsonl", "--out", tmp_path / "o", "--device", "cpu", "--max-steps", 4]
    assert sentence in refusal(align.app, args[0], *small, *args[1:])


def test_another_commands_folder_is_refused(judge):
    for name in ("grpo", "ppo", "sft"):
        assert "was made by another command" in refusal(align.app, name, "--resume", judge, "--max-steps", 9)


@pytest.mark.slow
def test_a_changed_reference_is_refused(base, lines, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    stage("grpo", tmp_path / "base", lines, tmp_path / "o", max_steps=1)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file({n: w * 1.01 for n, w in weights.items()}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    code, _, err = command("align.py", "grpo", "--resume", tmp_path / "o", "--max-steps", "2")
    assert code == 2 and "--model is not what" in err and "restore it to resume" in err


def test_prompts_without_checks(base, tmp_path):
    prompts = ['{"prompt": "Say it."}'] * 4 + [json.dumps({"prompt": "long " * 200})]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    with pytest.raises(UserError, match="needs prompts that carry checks"):
        stage("grpo", base, tmp_path, tmp_path / "o")
    learner = open_learner("grpo", base, tmp_path, tmp_path / "p")
    assert learner.state["counts"] == {"prompts": 4, "left out: no room for an answer": 1}
    (tmp_path / "q.jsonl").write_text('{"prompt": "Say it.", "check": {"task": "body"}}\n')
    with pytest.raises(UserError, match="'check' is not of the kind"):
        align.load_prompts(tmp_path / "q.jsonl")
    tasks = align.load_prompts(tmp_path / "prompts.jsonl", 2)
    with pytest.raises(UserError, match="--samples needs prompts that carry checks"):
        align.assess(base, tasks, samples=2)
    with pytest.raises(UserError, match="--reward judges between answers"):
        align.assess(base, tasks, reward="somewhere")


@pytest.mark.slow
@pytest.mark.parametrize("ours, kind", [("sequence", "grpo"), ("token", "bnpo"), ("constant", "dr_grpo")])
def test_grpo_loss_equals_trls(ours, kind, base, lines, tmp_path):
    """On the same rollouts, one update after them: a ratio that is not one, clipped on both sides, and a KL."""
    trl, transformers, datasets = (pytest.importorskip(name) for name in ("trl", "transformers", "datasets"))
    more = {"normalize": ours, "kl_coef": 0.1, "clip": 0.01, "clip_high": 0.02, "temperature": 0.8}
    learner = open_learner("grpo", base, lines, tmp_path / "o", **more)
    items, _ = items_of(learner, (TEXTS, REWARDS), (TEXTS[::-1], [0.0, 1.0, 1.0, 0.0]))
    with torch.no_grad():
        for p in learner.model.parameters():
            p.mul_(1.06)  # far enough that the loss is not near zero
        mine = learner.measure(items)
    assert 0 < mine["clip_fraction"]

    hf = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = trl.GRPOConfig(str(tmp_path / "t"), report_to=[], use_cpu=True, bf16=False, loss_type=kind, beta=0.1, epsilon=0.01,
                              epsilon_high=0.02, temperature=0.8, max_completion_length=8, per_device_train_batch_size=8,
                              num_generations=4)  # fmt: skip
    rows = datasets.Dataset.from_list([{"prompt": "x"}] * 8)
    trainer = trl.GRPOTrainer(model, lambda completions, **kw: [0.0] * len(completions), settings, rows, processing_class=hf)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.mul_(1.06)
    trainer.model.eval()
    every = [e for item in items for e in item.examples]
    lengths = [sum(e.trained) for e in every]
    old, reference, advantages = (align.facts_of(items, name).split(lengths) for name in ("logp", "reference", "advantages"))
    width = max(map(len, old))

    def padded(values, fill=0.0):
        return torch.stack([torch.cat((torch.as_tensor(v), torch.full((width - len(v),), fill))) for v in values])

    answers = [[t for t, own in zip(*e, strict=True) if own] for e in every]
    prompts = [e.ids[: -len(a)] for e, a in zip(every, answers, strict=True)]
    inputs = {"prompt_ids": torch.tensor(prompts), "prompt_mask": torch.ones(8, len(prompts[0]), dtype=torch.long),
              "completion_ids": padded(answers).long(), "completion_mask": padded([torch.ones(len(a)) for a in answers]).long(),
              "advantages": torch.stack([a[0] for a in advantages]), "old_per_token_logps": padded(old),
              "ref_per_token_logps": padded(reference),
              "num_items_in_batch": torch.tensor(sum(map(len, answers)))}  # fmt: skip
    theirs = trainer._compute_loss(trainer.model, inputs).item()
    assert mine["loss"] == pytest.approx(theirs, abs=1e-4) and abs(theirs) > 1e-3
