"""Answer the tasks of `align.py data` by rules, without a model: what passes here tells nothing about a model.

    python tests/script_without_a_model.py data/instructions    # the script's rows and the authors', as a table

It sees the prompt, and of the training answers the handful of words that most often are among an author's own. With
them it fills forms that do all that a prompt asks for. Form and words are chosen on train.jsonl (of a task that is
held out, on val.jsonl), the rates are those on test.jsonl.
"""

import builtins
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import align


def write_code(shown, words, *lines):
    """Write statements that read every parameter, raise and yield where the docstring speaks of it; words: as a comment."""
    head = re.search(r"(?s)def \w+\((.*?)\)[^()]*?:\n", shown + "\n")
    found = re.sub(r"\[[^\[\]]*\]|(?<!^)\([^()]*\)", "", head.group(1) if head else "")
    params = [p for p in re.findall(r"(?:^|,)[\s*]*(\w+)", found) if p not in ("self", "cls") and p[0] != "_"]
    every = f"({''.join(p + ', ' for p in params)})"
    asked = [f"if not {every}: raise ValueError()"] if re.search(r"(?i)\braises?\b", shown) else []
    asked += [f"yield {every}"] if re.search(r"(?i)\byields?\b", shown) else []
    indent = re.search(r"(?m)^ +(?=\S)|\Z", shown).group() or "    "
    lines = [indent + line.replace("EVERY", every) for line in (*asked, *lines)]
    return "\n".join(lines) + "  # " + " ".join(words)


def insert_sign(shown, near, late):
    """Put a sign back near the place where the parser stops: the first that it takes.

    near: how much an earlier sign of the list is worth, in letters; late: the same of the end of the line. Words that
    the code has nowhere else cost more than both.
    """
    try:
        compile(shown, "shown", "exec")
        return ""
    except SyntaxError as error:
        row = min(max(error.lineno or 1, 1), shown.count("\n") + 1) - 1
        stop = (error.offset or 1) - 1
    lines = shown.split("\n")
    known = {*re.findall(r"\w+", "\n".join(lines[:row] + lines[row + 1 :])), *dir(builtins), "self", "cls"}
    tries = []
    for place in range(len(lines[row]) + 1):
        for rank, sign in enumerate(")]},:([{=."):
            line = lines[row][:place] + sign + lines[row][place:]
            new = sum(word not in known for word in re.findall(r"\w+", line))
            tries.append((abs(place - stop) + near * rank - late * (place == len(lines[row])) + 30 * new, line))
    for _, line in sorted(tries)[:400]:
        code = "\n".join([*lines[:row], line, *lines[row + 1 :]])
        tree = align.parse(code)
        if tree and [type(node).__name__ for node in tree.body] == ["FunctionDef"]:
            return code
    return ""


def frequent(shown):
    """Choose the most frequent word of a code."""
    found = [w for w in re.findall(r"[a-z]{4,}", shown) if align.words(w)]
    return Counter(found).most_common(1)[0][0] if found else "it"


RETURNS = [lambda shown, words: write_code(shown, words, "return list(EVERY)"),
           lambda shown, words: write_code(shown, words, "result = list(EVERY)", "return result")]  # fmt: skip
FORMS = {
    "body": RETURNS,
    "doc": [lambda shown, words: f"The {' '.join(words)}.",
            lambda shown, words: f"{'Return' if 'return ' in shown else 'Make'} the {frequent(shown)} {' '.join(words)}."],
    "name": [lambda shown, words: "_".join(words) or "it",
             lambda shown, words: "_".join([*words, frequent(shown)])],
    "mend": [lambda shown, words, near=near, late=late: insert_sign(shown, near, late) for near in (1, 4) for late in (0, 30)],
    "continue": RETURNS,
}  # fmt: skip


def grade(record, answer):
    return align.grade(record["check"], answer, True)


def agrees(record, answer):
    rules = record["check"]
    if record["task"] == "mend":
        return grade(record, answer)["agrees"]
    return align.agreement(answer, rules["answer"], rules["shown"]) >= align.AGREES


def choose(records, forms, most=6):
    """Choose the form, and one by one the words, with which most answers agree with the authors'."""
    own = Counter(w for r in records for w in align.words(r["check"]["answer"]) - align.words(r["check"]["shown"]))
    candidates = [] if records[0]["task"] == "mend" else [w for w, _ in own.most_common(40)]
    best = (-1, None, [])
    for form in forms:
        words = []
        score = sum(agrees(r, form(code_of(r), words)) for r in records)
        for _ in range(most if candidates else 0):
            tries = [(sum(agrees(r, form(code_of(r), [*words, w])) for r in records), w) for w in candidates]
            if max(tries)[0] <= score:
                break
            score, word = max(tries)
            words.append(word)
        best = max(best, (score, form, words), key=lambda b: b[0])
    return best[1:]


def code_of(record):
    return record["messages"][0]["content"].split("\n\n", 1)[1]


def measure(folder, seeds=3, most=150):
    """Measure the script and the authors -> a row {task, who, n, passes, each check, likeness, words} of each."""
    files = {s: [json.loads(line) for line in open(Path(folder) / f"{s}.jsonl")] for s in ("train", "val", "test")}
    for task in align.TASKS:
        train, val, test = ([r for r in files[s] if r["task"] == task] for s in files)
        seen = train or val
        if not seen or not test:
            continue
        for seed in range(seeds):
            form, words = choose(random.Random(seed).sample(seen, min(most, len(seen))), FORMS[task])
            answers = [form(code_of(r), words) for r in test]
            yield row(task, f"script, seed {seed}", test, answers, words)
        yield row(task, "authors", test, [r["check"]["answer"] for r in test])


def row(task, who, records, answers, words=()):
    grades = [grade(r, a) for r, a in zip(records, answers, strict=True)]
    rates = {name: align.row([g[name] for g in grades])[0] for name in align.CHECKS}
    passes, low, high, n = align.row([all(g.values()) for g in grades])
    like = align.row([align.likeness(a, r["check"]["answer"]) for r, a in zip(records, answers, strict=True)])[0]
    return {"task": task, "who": who, "n": n, "passes": passes, "low": low, "high": high, **rates, "likeness": like, "words": words}


if __name__ == "__main__":
    shown = ("passes", *align.CHECKS, "likeness")
    print("| task | who | n |", " | ".join(shown), "| words |")
    print("|---" * (len(shown) + 4) + "|")
    for r in measure(*sys.argv[1:2]):
        rates = [f"{r[name]:.2f}" + f" ({r['low']:.2f} to {r['high']:.2f})" * (name == "passes") for name in shown]
        print(f"| {r['task']} | {r['who']} | {r['n']} |", " | ".join(rates), "|", " ".join(r["words"]), "|")
