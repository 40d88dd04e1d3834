"""align.py's PPO and GRPO: advantages and losses by hand, against trl's, bandits with known optima, faults, kills."""

import json
import math

import pytest
import torch
from conftest import ROOT, command, prepare, refusal, wait_for

import align
from align import Answer, Episode, GRPOStage, PPOStage, group_advantages, grpo_run, ppo_run
from model import Config, Transformer, UserError, load_model, load_tokenizer, render, save_checkpoint

SMALL = {"max_steps": 4, "batch_size": 4, "warmup_steps": 1, "eval_interval": 2, "save_interval": 1, "dtype": "fp32", "max_new_tokens": 8,
         "device": "cpu"}  # fmt: skip


def records(folder):
    return [json.loads(line) for line in open(folder / "metrics.jsonl")]


def open_run(kind, base, lines, out, **more):
    o = {"grpo": GRPOStage, "ppo": PPOStage}[kind](
        **{**SMALL, "model": str(base), "data": (str(lines / "prompts.jsonl"),), "out": str(out), **more}
    )
    return {"grpo": grpo_run, "ppo": ppo_run}[kind](o)


def stage(name, base, lines, out, *more, **kw):
    small = [w for k, v in SMALL.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    return command("align.py", name, "--model", base, "--data", lines / "prompts.jsonl", "--out", out, *small, *more, **kw)


def episodes_of(run, texts, rewards):
    """Episodes to the first prompt, as if they had been played."""
    record, end = run.prompts[0], run.tokenizer.im_end_id
    answers = [Answer([*run.tokenizer.encode(t), end], t, True) for t in texts]
    return [Episode(record, a, r, False) for a, r in zip(answers, rewards, strict=True)]


TEXTS, WORTH = ["    return a", "    pass", "    x = a + 1\n    return x", ""], [1.0, 0.0, 0.5, 0.25]


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
        assert align.beyond_clip(x, torch.tensor([float(advantage)]), GRPOStage()).item() == (not live)
    x = torch.tensor([math.log(1.25)], requires_grad=True)
    align.clipped_loss(x, torch.ones(1), 0.2, 0.28).backward()
    assert x.grad.item() == pytest.approx(-1.25)  # clip-higher lets it go on
    for value, target, live in ((0.1, 1.0, True), (0.5, 1.0, False), (0.5, 0.0, True), (-0.5, -1.0, False)):
        v = torch.tensor([value], requires_grad=True)
        align.value_loss(v, torch.zeros(1), torch.tensor([target]), 0.2).backward()
        assert (v.grad.abs().item() > 0) == live


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
    assert align.adapted(0.1, 12.0, 6.0) == pytest.approx(0.102) and align.adapted(0.1, 5.4, 6.0) == pytest.approx(0.099)


def test_pass_at_k():
    """The estimator is the mean over all subsets."""
    from itertools import combinations

    right = [1, 0, 0, 1, 0]
    for k in range(1, 6):
        every = [max(s) for s in combinations(right, k)]
        assert align.pass_at_k(5, 2, k) == pytest.approx(sum(every) / len(every))


@pytest.mark.parametrize("kind, options", [("grpo", {"normalize": "token"}), ("grpo", {"normalize": "sequence", "temperature": 0.7}),
                                           ("ppo", {"value_coef": 0.0})])  # fmt: skip
def test_the_first_gradient_is_the_policy_gradients(kind, options, base, lines, tmp_path):
    """At ratio 1 the gradient of the clipped objective is that of -A log p, over answers' tokens only."""
    run = open_run(kind, base, lines, tmp_path / "o", kl_coef=0.0, **options)
    run.credit([episodes_of(run, TEXTS, WORTH)])
    run.model.train()
    run.measure([0], run.items, run.loss, backward=True)
    found = {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}
    plain, total = load_model(base), 0.0
    lengths = [sum(e.trained) for e in run.items[0]]
    old, advantages = run.old[0].split(lengths), run.advantages[0].split(lengths)
    for i, (e, text, length) in enumerate(zip(run.items[0], TEXTS, lengths, strict=True)):
        assert run.tokenizer.decode([t for t, own in zip(*e, strict=True) if own]) == text + "<|im_end|>"
        logits = plain(torch.tensor([e.ids]))[0][0] / options.get("temperature", 1.0)
        logp = logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(e.ids[1:])[:, None])[:, 0][-length:]
        torch.testing.assert_close(old[i], logp.detach(), rtol=1e-4, atol=1e-4)
        total = total - (advantages[i] * logp).sum() / (4 * length if options.get("normalize") == "sequence" else sum(lengths))
    total.backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)


def test_grpo_begins_at_zero_and_ppo_at_its_critic(base, lines, tmp_path):
    run = open_run("grpo", base, lines, tmp_path / "g", normalize="sequence")
    run.credit([episodes_of(run, TEXTS, WORTH)])
    stats = run.measure([0], run.items, run.loss, backward=False)
    assert stats["loss"] == pytest.approx(0, abs=1e-6) and stats["clip_fraction"] == 0
    run = open_run("grpo", base, lines, tmp_path / "t", normalize="token")
    run.credit([episodes_of(run, TEXTS, WORTH)])
    lengths = torch.tensor([len(e.answer.ids) for e in run.groups[0]])
    want = -(group_advantages(torch.tensor(WORTH)) * lengths).sum() / lengths.sum()
    assert abs(want) > 0.01 and run.measure([0], run.items, run.loss, backward=False)["loss"] == pytest.approx(want.item(), abs=1e-5)
    run = open_run("ppo", base, lines, tmp_path / "p")
    stats = run.credit([episodes_of(run, TEXTS, WORTH)])
    assert all((v == 0).all() for v in run.values) and stats["kl"] == pytest.approx(0, abs=1e-6)
    lengths = [len(e.answer.ids) for e in run.groups[0]]
    for returns, e in zip(run.returns[0].split(lengths), run.groups[0], strict=True):
        # no critic yet, gamma 1: lambda to the way that is left
        want = e.reward * 0.95 ** torch.arange(len(returns) - 1, -1, -1.0)
        torch.testing.assert_close(returns, want, rtol=1e-4, atol=1e-5)
    every = torch.cat(run.advantages)
    assert every.mean().abs() < 1e-5 and every.std().item() == pytest.approx(1, abs=1e-4)


def test_flat_groups(base, lines, tmp_path):
    """Groups without variance are left out, or with --keep-flat only dilute the mean."""
    losses = []
    for flat in (False, True):
        run = open_run("grpo", base, lines, tmp_path / str(flat), keep_flat=flat, kl_coef=0.0, normalize="sequence")
        run.credit([episodes_of(run, TEXTS, WORTH), episodes_of(run, TEXTS, [0.5] * 4)])
        assert len(run.items) == (2 if flat else 1)
        run.measure(range(len(run.items)), run.items, run.loss, backward=True)
        losses.append(run.model.lm_head.weight.grad.clone())
    torch.testing.assert_close(losses[0], 2 * losses[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "kind, option",
    [("grpo", {"clip": 0.01}), ("grpo", {"clip_high": 0.01}), ("grpo", {"scale": "none"}), ("grpo", {"kl_coef": 0.5}),
     ("grpo", {"normalize": "sequence"}), ("grpo", {"normalize": "constant"}), ("grpo", {"temperature": 0.5}),
     ("ppo", {"clip": 0.01}), ("ppo", {"gamma": 0.9}), ("ppo", {"lam": 0.5}), ("ppo", {"kl_coef": 0.5}), ("ppo", {"value_coef": 0.5}),
     ("ppo", {"value_clip": 0.01}), ("ppo", {"entropy_coef": 0.1}), ("ppo", {"temperature": 0.5})],
)  # fmt: skip
def test_every_option_changes_the_loss(kind, option, base, lines, tmp_path):
    """With a policy that is neither the reference (so there is a KL) nor what played (a ratio), and a critic that has values."""
    losses = []
    for more in ({}, option):
        run = open_run(kind, base, lines, tmp_path / "o", **more)
        with torch.no_grad():
            for name, p in run.model.named_parameters():
                p.mul_(1.02) if "critic" not in name else p.add_(0.05)
        run.credit([episodes_of(run, TEXTS, WORTH)])
        with torch.no_grad():
            for p in run.model.parameters():
                p.mul_(1.04)
        losses.append(run.measure([0], run.items, run.loss, backward=False)["loss"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)


def test_entropy_is_worth_something(base, lines, tmp_path):
    """The loss is the one without, less the coefficient times the mean entropy of the answers' tokens."""
    losses = []
    for coef in (0.0, 0.1):
        run = open_run("ppo", base, lines, tmp_path / "o", entropy_coef=coef)
        run.credit([episodes_of(run, TEXTS, WORTH)])
        losses.append(run.measure([0], run.items, run.loss, backward=True)["loss"])
    logps = [load_model(base)(torch.tensor([e.ids]))[0][0, [i - 1 for i in range(len(e.ids)) if e.trained[i]]].log_softmax(-1)
             for e in run.items[0]]  # fmt: skip
    entropy = -torch.cat([(p.exp() * p).sum(-1) for p in logps]).mean()
    assert losses[0] - losses[1] == pytest.approx(0.1 * entropy.item(), rel=1e-4)


def test_passes_and_minibatches_are_updates(base, lines, tmp_path):
    run = open_run("grpo", base, lines, tmp_path / "o", passes=3, minibatches=2, samples=4)
    run.worth = lambda records, answers: [float(i % 3) for i in range(len(answers))]
    sizes, update = [], run.update
    run.update = lambda picks: sizes.append(len(picks)) or update(picks)
    run.step(1e-4)
    assert sizes == [2] * 6


# Bandits: answers of one token, and arms that many tokens share ---------------------------------------------------------


def play_bandit(kind, base, lines, out, worth, steps, **more):
    """-> probabilities of all tokens, before and after."""
    more = {"max_steps": steps, "unended": 0.0, "max_new_tokens": 1, "lr": 3e-3, "schedule": "cosine", "minibatches": 1, **more}
    run = open_run(kind, base, lines, out, eval_interval=10**6, save_interval=10**6, **more)
    run.prompts = run.prompts[:1]
    run.worth = lambda records, answers: [worth(a.ids[0]) for a in answers]
    prompt = torch.tensor([run.prompts[0]["ids"]])
    before = load_model(base)(prompt)[0][0, -1].softmax(-1).detach()
    run.go()
    return before, run.model(prompt)[0][0, -1].softmax(-1).detach()


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_ten_arms(kind, base, lines, tmp_path):
    """The best of ten is found, with payouts that are close."""
    pay = [0.1, 0.5, 0.2, 0.9, 0.3, 0.7, 0.0, 0.4, 0.6, 0.8]
    size = {"batch_size": 4, "samples": 16} if kind == "grpo" else {"batch_size": 64, "samples": 1, "passes": 2}
    steps = 250 if kind == "grpo" else 100
    _, after = play_bandit(kind, base, lines, tmp_path / "o", lambda token: pay[token % 10], steps, kl_coef=0.0, **size)
    assert after[3::10].sum() > 0.9


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_two_arms_with_kl(kind, base, lines, tmp_path):
    """Even tokens pay 1. PPO's KL, in the reward, is KL(p || ref), and its optimum p ~ ref e^(r/b); GRPO's, in the loss, has the
    gradient of KL(ref || p), and the optimum p = b ref / (c - r), with r a (n-1)/n of itself, the mean being its own."""
    b, n = 0.5, 16
    size = {"batch_size": 8, "samples": n, "scale": "none"} if kind == "grpo" else {"batch_size": 128, "samples": 1, "passes": 1}
    steps = 300 if kind == "grpo" else 150
    before, after = play_bandit(kind, base, lines, tmp_path / "o", lambda t: 1.0 - t % 2, steps, kl_coef=b, **size)
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
    small = ["--max-steps", "3", "--batch-size", "4"]
    code, _, err = command("align.py", "reward", "--model", base, "--data", lines / "pairs.jsonl", "--out", home / "r", *small)
    assert code == 0, err
    return home / "r"


@pytest.mark.parametrize("name, more", [("grpo", ()), ("ppo", ("--critic", "own", "--kl-target", "3")), ("ppo", ("--entropy-coef", "0.01")),
                                        ("grpo", ("--lora-rank", "4", "--optimizer", "muon"))])  # fmt: skip
def test_resume_is_exact(name, more, base, lines, tmp_path):
    more = ("--schedule", "constant", *more)
    code, _, err = stage(name, base, lines, tmp_path / "whole", *more)
    assert code == 0, err
    assert stage(name, base, lines, tmp_path / "part", *more, "--max-steps", "2")[0] == 0
    code, _, err = command("align.py", name, "--resume", tmp_path / "part", "--max-steps", "4")
    assert code == 0, err
    whole, part = (load_model(tmp_path / f).state_dict() for f in ("whole", "part"))
    assert all(torch.equal(whole[n], part[n]) for n in whole) and not any(n.startswith("critic") for n in whole)
    assert any(not torch.equal(whole[n], w) for n, w in load_model(base).state_dict().items())
    times = {"seconds", "ms_per_step", "tok_per_s", "rollout_share", "generated_per_s"}
    one, two = ([{k: v for k, v in r.items() if k not in times} for r in records(tmp_path / f)] for f in ("whole", "part"))
    assert [r for r in one if "reward" in r] == [r for r in two if "reward" in r]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_kills(name, base, lines, tmp_path):
    more = ("--max-steps", "100", "--save-interval", "2")
    assert stage(name, base, lines, tmp_path / "whole", *more)[0] == 0
    code, _, _ = stage(name, base, lines, tmp_path / "part", *more, kill_after=0.7, once=tmp_path / "part" / "config.json")
    assert code != 0
    kills = 0
    while code != 0:
        wait_for(tmp_path / "part" / "config.json") if not (tmp_path / "part.old").exists() else None
        code, _, err = command("align.py", name, "--resume", tmp_path / "part", kill_after=4 + kills if kills < 4 else None)
        kills += 1
        if "is finished" in err:  # killed after its last save
            break
        assert kills < 9, err
    whole, part = (load_model(tmp_path / f).state_dict() for f in ("whole", "part"))
    assert all(torch.equal(whole[n], part[n]) for n in whole)


RANKS = """
import sys; sys.path.insert(0, {root!r})
import torch, align
from model import setup_distributed
name, out = sys.argv[1:]
kind, open_run = (align.GRPOStage, align.grpo_run) if name == "grpo" else (align.PPOStage, align.ppo_run)
run = open_run(kind(out=out, samples=4, max_steps=2, lr=1e-3, **{small!r}))
texts = ["    return a", "    pass", "    x = a + 1", "", "a", "    return None"]

def rollout(model, tokenizer, prompts, temperature, seed, max_new_tokens, samples, cache=None):  # the same whoever draws them
    every = [texts[(sum(p) + i) % len(texts)] for p in prompts for i in range(samples)]
    return [align.Answer([*tokenizer.encode(t), tokenizer.im_end_id], t, True) for t in every]

align.rollout, run.evaluate = rollout, lambda: setattr(run, "result", {{}})
run.worth = lambda records, answers: [float(len(a.ids) % 3) for a in answers]
run.go()
sums = torch.cat([p.detach().flatten() for p in run.model.parameters()])
torch.save(sums, f"{{out}}.{{run.ranks.rank}}")
"""


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_two_ranks_learn_what_one_does(name, base, lines, tmp_path):
    """Of the same answers, shared out: the weights are one process's, and both ranks have them."""
    small = {k: v for k, v in SMALL.items() if k != "max_steps"} | {"model": str(base), "data": (str(lines / "prompts.jsonl"),)}
    (tmp_path / "play.py").write_text(RANKS.format(root=str(ROOT), small=small))
    found = []
    for ranks in (1, 2):
        code, _, err = command(tmp_path / "play.py", name, tmp_path / f"{ranks}", ranks=ranks)
        assert code == 0, err
        found += [torch.load(tmp_path / f"{ranks}.{rank}") for rank in range(ranks)]
    start = torch.cat([p.detach().flatten() for p in load_model(base).parameters()])
    assert (found[0][: len(start)] - start).abs().max() > 1e-4
    assert torch.equal(found[1], found[2])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_two_ranks_play(base, lines, judge, tmp_path):
    """Each draws its share of the answers, and has them scored."""
    code, _, err = stage("ppo", base, lines, tmp_path / "o", "--samples", "4", "--max-steps", "2", "--reward", judge, ranks=2)
    assert code == 0, err
    rows = [r for r in records(tmp_path / "o") if "reward" in r]
    assert len(rows) == 2 and all(math.isfinite(r["loss"]) and r["distinct"] > 0.5 and r["reward_std"] > 0 for r in rows)


def test_what_is_logged(base, lines, judge, tmp_path):
    """Rewards are summed by weight; a reward model reads text."""
    code, _, err = stage("ppo", base, lines, tmp_path / "o", "--reward", f"{judge}:0.5", "--reward", "checks", "--reward", "parses:2",
                         "--kl-target", "3")  # fmt: skip
    assert code == 0, err
    rows = records(tmp_path / "o")
    step = next(r for r in rows if "reward" in r)
    assert {"reward", "reward_std", "good", "kl", "kl_answer", "kl_coef", "entropy", "length", "ended", "distinct", "flat", "clip_fraction",
            "explained_variance", "rollout_share", "grad_norm", "value_loss", "policy_loss"} <= step.keys()  # fmt: skip
    coefs = [r["kl_coef"] for r in rows if "kl_coef" in r]
    assert coefs[0] == 0.005 and all(b < a for a, b in zip(coefs, coefs[1:], strict=False))  # near the reference: ever cheaper
    check = json.loads((lines / "prompts.jsonl").read_text().splitlines()[0])["check"]
    record = {"prompt": [{"role": "user", "content": "def f(a):"}], "check": check}
    answers = [Answer([1], "    return a + 1", True), Answer([1], "    pass", True), Answer([1], "    pass", False)]
    worth = align.reward_function(("checks", "parses:2"), 1.0, "cpu")([record] * 3, answers)
    assert worth == pytest.approx([1 + 2, 4 / 6 / 2 + 2, 3 / 6 / 2 + 2 - 1])
    scored = align.reward_function((f"{judge}:0.5",), 0.0, "cpu")([record] * 3, answers)
    assert scored[1] == pytest.approx(scored[2], rel=1e-4) and scored[0] != pytest.approx(scored[1], rel=1e-3)
    talk = [*record["prompt"], {"role": "assistant", "content": answers[0].text}]
    assert scored[0] == pytest.approx(align.open_judge(judge, "cpu")([talk])[0] / 2)


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
    judge = align.open_judge(tmp_path / "judge", "cpu")
    assert judge([talk]) and "is left out" not in capsys.readouterr().err
    scores, last = judge([talk, long, talk]), render(tokenizer, long)[0][-96:]
    want = [model(torch.tensor([x]))[0][0, -1].item() for x in (ids, last, ids)]
    assert len(last) == 96 and scores == pytest.approx(want, rel=1e-4) and want[0] != pytest.approx(want[1], rel=1e-3)
    assert "of 1 of 3 texts the beginning is left out" in " ".join(capsys.readouterr().err.split())
    code, _, err = stage("grpo", base, lines, tmp_path / "o", "--reward", tmp_path / "judge", "--max-steps", "2")
    assert code == 0, err
    rows = [r for r in records(tmp_path / "o") if "reward" in r]
    assert len(rows) == 2 and all(math.isfinite(r["reward"]) for r in rows)


def test_a_changed_judge_is_refused(base, lines, tmp_path):
    model = load_model(base)
    for seed in (0, 1):
        judge = align.with_head(model, "score")
        torch.nn.init.normal_(judge.score.weight, generator=torch.Generator().manual_seed(seed))
        save_checkpoint(tmp_path / "judge", judge, base / "tokenizer.json")
        if seed == 0:
            assert stage("grpo", base, lines, tmp_path / "o", "--reward", tmp_path / "judge", "--max-steps", "1")[0] == 0
    code, _, err = command("align.py", "grpo", "--resume", tmp_path / "o", "--max-steps", "2")
    assert code == 2 and "is not what" in err and "rewarded by" in err


def test_best_of_n_and_the_vote(base, lines, monkeypatch):
    """By hand, of four answers to each of two prompts."""
    prompts = align.load_prompts(str(lines / "prompts.jsonl"), None)[:2]
    texts = ["    return a + 1", "    pass", "    return a+1  # the same", "x"], ["    pass", "    pass", "    return a * 2", "    ..."]
    answers = [Answer([1], t, True) for some in texts for t in some]
    monkeypatch.setattr(align, "answer_all", lambda *args, **kw: (None, None, answers))
    monkeypatch.setattr(align, "open_judge", lambda *args: lambda talks: [0, 3, 1, 2, 0, 1, 3, 2])
    found = {k: v[0] for k, v in align.more_answers(base, prompts, 4, "judge", 0.7, 0, "cpu").items()}
    assert found["pass@1"] == pytest.approx((2 / 4 + 1 / 4) / 2) and found["pass@4"] == 1.0
    assert found["pass@2"] == pytest.approx((5 / 6 + 3 / 6) / 2)
    assert found["good: vote of 4"] == 0.5  # `return a + 1`, twice, but `pass` twice
    assert found["good: best of 4 by the reward model"] == 0.5  # `pass`, and `return a * 2`
    deep = Answer([1], "    return " + "+".join(["a"] * 1200), True)
    assert align.vote(prompts[0], [deep, deep, answers[0]]) == 0


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_rewards_that_are_no_number(name, base, lines, tmp_path, capsys):
    """Their answers are left out, and counted; a step of nothing else changes nothing."""
    run = open_run(name, base, lines, tmp_path / "o", samples=4, max_steps=2)
    calls = []

    def worth(records, answers):
        calls.append(len(answers))
        return [math.nan if len(calls) == 2 or i == 0 else float(len(a.ids)) for i, a in enumerate(answers)]

    run.worth = worth  # (the first call is an evaluation's)
    run.go()
    rows = [r for r in records(tmp_path / "o") if "nan_rewards" in r]
    assert [r["nan_rewards"] for r in rows] == [16, 1] and "loss" not in rows[0] and math.isfinite(rows[1]["loss"])
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_endless_answers_pay(base, lines, tmp_path):
    """Cut at --max-new-tokens, and --unended is taken off."""
    rewards = []
    for unended in ("0", "5"):
        code, _, err = stage("grpo", base, lines, tmp_path / unended, "--unended", unended, "--reward", "parses", "--max-steps", "1")
        assert code == 0, err
        rewards.append(next(r for r in records(tmp_path / unended) if "reward" in r))
    one, two = rewards
    assert one["ended"] == two["ended"] < 1 and one["length"] <= 8
    assert one["reward"] - two["reward"] == pytest.approx(5 * (1 - one["ended"]), abs=1e-5)


def test_groups_of_equal_rewards_change_nothing(base, lines, tmp_path):
    run = open_run("grpo", base, lines, tmp_path / "o", max_steps=2, lr=1.0)
    run.worth = lambda records, answers: [1.0] * len(answers)
    run.go()
    rows = [r for r in records(tmp_path / "o") if "flat" in r]
    assert [r["flat"] for r in rows] == [1.0, 1.0]
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), load_model(base).parameters(), strict=True))


@pytest.mark.parametrize(
    "args, sentence",
    [
        (("grpo", "--samples", "1"), "--samples has to be at least 2"),
        (("grpo", "--scale", "x"), "--scale is std or none"),
        (("ppo", "--critic", "x"), "--critic is shared or own"),
        (("ppo", "--lam", "2"), "--gamma and --lam lie between 0 and 1"),
        (("ppo", "--clip", "0"), "--clip between 0 and 1"),
        (("grpo", "--reward", "nowhere"), "holds no checkpoint"),
        (("grpo", "--reward", "BASE"), "is no reward model"),
        (("grpo", "--reward", "checks:1.2.3"), "holds no checkpoint"),
        (("grpo", "--kl-coef", "-1"), "--kl-coef cannot be below 0"),
        (("grpo", "--clip-high", "-0.5"), "--clip-high has to be above it"),
        (("ppo", "--kl-coef", "0", "--kl-target", "3"), "--kl-target needs a --kl-coef above 0"),
        (("ppo", "--max-steps", "0"), "--max-steps has to be above zero"),
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


def test_a_changed_reference_is_refused(base, lines, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(base, tmp_path / "base")
    assert stage("grpo", tmp_path / "base", lines, tmp_path / "o", "--max-steps", "1")[0] == 0
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file({n: w * 1.01 for n, w in weights.items()}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    code, _, err = command("align.py", "grpo", "--resume", tmp_path / "o", "--max-steps", "2")
    assert code == 2 and "restore it to resume" in err


def test_prompts_without_checks(base, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Say it."}\n' * 4 + json.dumps({"prompt": "long " * 200}) + "\n")
    with pytest.raises(UserError, match="needs prompts that carry checks"):
        o = GRPOStage(**{**SMALL, "model": str(base), "data": (str(tmp_path / "p.jsonl"),), "out": str(tmp_path / "o")})
        grpo_run(o).go()
    (tmp_path / "q.jsonl").write_text('{"prompt": "Say it.", "check": {"task": "body"}}\n')
    with pytest.raises(UserError, match="its 'check' is not of the kind"):
        align.load_prompts(str(tmp_path / "q.jsonl"), None)
    with pytest.raises(UserError, match="--samples needs prompts that carry checks"):
        align.assess(base, align.load_prompts(str(tmp_path / "p.jsonl"), 2), samples=2)
    with pytest.raises(UserError, match="--reward judges between answers"):
        align.assess(base, align.load_prompts(str(tmp_path / "p.jsonl"), 2), reward="somewhere")
    o = GRPOStage(**{**SMALL, "model": str(base), "data": (str(tmp_path / "p.jsonl"),), "out": str(tmp_path / "o")})
    assert grpo_run(o).counts == {"prompts": 4, "left out: no room for an answer": 1}


@pytest.mark.slow
@pytest.mark.parametrize("ours, kind", [("sequence", "grpo"), ("token", "bnpo"), ("constant", "dr_grpo")])
def test_grpo_loss_equals_trls(ours, kind, base, lines, tmp_path):
    """On the same rollouts, one update after them: a ratio that is not one, clipped on both sides, and a KL."""
    trl, transformers, datasets = (pytest.importorskip(name) for name in ("trl", "transformers", "datasets"))
    run = open_run("grpo", base, lines, tmp_path / "o", normalize=ours, kl_coef=0.1, clip=0.01, clip_high=0.02, temperature=0.8)
    run.credit([episodes_of(run, TEXTS, WORTH), episodes_of(run, TEXTS[::-1], [0.0, 1.0, 1.0, 0.0])])
    with torch.no_grad():
        for p in run.model.parameters():
            p.mul_(1.06)  # far enough that the loss is not near zero
    mine = run.measure(range(2), run.items, run.loss, backward=False)
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
    every = [e for item in run.items for e in item]
    lengths = [[sum(e.trained) for e in item] for item in run.items]
    old, reference, advantages = ([part for tokens, n in zip(values, lengths, strict=True) for part in tokens.split(n)]
                                  for values in (run.old, run.theirs, run.advantages))  # fmt: skip
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
