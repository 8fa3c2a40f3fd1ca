"""results/demo.html: its arithmetic against torch, and the page itself in a real browser.

Nothing is trained and MNIST is not needed: the committed checkpoints look at made-up digits.
"""

import json
import re
import shutil
import subprocess
from base64 import b64decode
from html import unescape

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, made_up_digits, write_world

import common
import gradcam

LABELS = ("Lazy", "Cured", "Hard to fool")
NETS = ("baseline_s42", "jitter_s42", "at_balanced_s42")
SHOWN = tuple(zip(NETS, LABELS, ("It is.", "It was.", "It is not."), strict=True))
HTML = (ROOT / "results" / "demo.html").read_text(encoding="utf-8")
SCRIPTS = dict(re.findall(r'<script id="(\w+)">(.*?)</script>', HTML, re.DOTALL))
SEED = 42
NODE = shutil.which("node")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_node = pytest.mark.skipif(not NODE, reason="node is not installed")
needs_browser = pytest.mark.skipif(not BROWSER, reason="no chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A world with checkpoints, demo.html and demo.js, as results/ is."""
    folder = tmp_path_factory.mktemp("page")
    write_world(folder)
    for name in NETS:
        shutil.copy(ROOT / "results" / f"{name}.pt", folder)
        shutil.copy(ROOT / "results" / f"{name}.json", folder)
    named = "\n".join(map(": ".join, SHOWN))
    query = f"<!-- networks\n{named}\nopening 0 4, choice 0 1 -->"
    html = re.sub(r"<!-- networks\n.*?-->", query, HTML, count=1, flags=re.DOTALL)
    (folder / "demo.html").write_text(html, encoding="utf-8")
    gradcam.make_page(gradcam.get_args(["--page", "--dir", str(folder)]), "cpu")
    return folder


@pytest.fixture(scope="module")
def models(folder):
    return {name: common.load_model(folder, name)[0] for name in NETS}


def demo(folder=ROOT / "results"):
    """What demo.js says."""
    text = (folder / "demo.js").read_text(encoding="utf-8")
    return json.loads(text.removeprefix("window.DEMO = ").removesuffix(";\n"))


def on_colours(gray, colours):
    """One digit uint8 (28,28) on colours (N,3), with the page's one texture: uint8 (N,3,28,28)."""
    rows = [common.paint(gray[None], c[None], common.stream(SEED, "texture")) for c in colours]
    return torch.cat(rows)


# ---- what is committed


def test_size_and_sources():
    """One small file that loads nothing but demo.js."""
    assert len(HTML.encode()) <= 30 * 1024
    assert re.findall(r'(?:src|href)="([^"]*)"', HTML) == ["#", "demo.js"]
    assert not re.search(r"https?:|\bfetch\(|\bimport\b|@import|url\(", HTML)


def test_committed_data_is_of_the_committed_networks():
    """results/demo.js holds the weights and the scores that stand beside it, in 400 KB."""
    assert (ROOT / "results" / "demo.js").stat().st_size <= 400_000
    for net in demo()["networks"]:
        model, _ = common.load_model(ROOT / "results", net["name"])
        weights = torch.cat([part.flatten() for part in model.state_dict().values()])
        ours = torch.frombuffer(bytearray(b64decode(net["weights"])), dtype=torch.float32)
        assert torch.equal(ours, weights), net["name"]
    says_its_scores(ROOT / "results")


def says_its_scores(folder):
    for net in demo(folder)["networks"]:
        score = common.load_json(folder / f"{net['name']}.json", "")["final"]["test_hard"]
        assert (net["right"], net["of"]) == (score["acc"], score["n"])


def test_a_page_that_is_made_says_the_scores_on_test_hard(folder):
    says_its_scores(folder)


# ---- (a) the arithmetic


def node(folder, code, **given):
    """What `code` returns in node, where the page's maths, networks and `given` are in reach."""
    program = f"""
        const window = {{}};
        {(folder / "demo.js").read_text(encoding="utf-8")}
        {SCRIPTS["maths"]}
        const given = JSON.parse(require("fs").readFileSync(0));
        const nets = window.DEMO.networks.map(unpack);
        const noise = decode(window.DEMO.noise, Float32Array);
        const numbers = (list) => Float32Array.from(list);
        const plain = (_, value) => ArrayBuffer.isView(value) ? [...value] : value;
        (async () => {{ {code} }})().then((found) => console.log(JSON.stringify(found, plain)));
    """
    script = folder / "maths.js"
    script.write_text(program, encoding="utf-8")
    command = {"input": json.dumps(given), "capture_output": True, "text": True, "check": True}
    return json.loads(subprocess.run([NODE, script], **command).stdout)


@pytest.fixture(scope="module")
def pictures():
    """Float (30,3,28,28) in [0, 1]: made-up digits on any colour."""
    gray, _ = made_up_digits(30)
    gen = torch.Generator().manual_seed(7)
    colours = common.rgb(common.PALETTE)[torch.randint(10, (30,), generator=gen)]
    return common.as_seen(common.paint(gray, colours, gen))


@needs_node
def test_network_agrees_with_torch(folder, models, pictures):
    """Logits, HiResCAM maps and the gradient of the loss towards a 3, of 30 digits."""
    found = node(
        folder,
        """
        return nets.map((net) => given.pictures.map((list) => {
          const x = numbers(list);
          const trace = forward(net, x);
          const slope = softmax(trace.logits);
          const map = heatMap(net, trace, argmax(slope));
          slope[3] -= 1;
          return { logits: trace.logits, map, gradient: backward(net, trace, slope) };
        }));
        """,
        pictures=pictures.flatten(1).tolist(),
    )
    for model, ours in zip(models.values(), found, strict=True):
        x = pictures.clone().requires_grad_()
        features = model.features(x)
        logits = model.fc(features.flatten(1))
        best = logits.max(1).values.sum()
        (slope,) = torch.autograd.grad(best, features, retain_graph=True)
        target = torch.full((len(x),), 3)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, target, reduction="sum"), x)
        expected = {"logits": logits, "map": (features * slope).sum(1), "gradient": gradient}
        for key, value in expected.items():
            read = torch.tensor([one[key] for one in ours]).view_as(value)
            torch.testing.assert_close(read, value.detach(), atol=1e-4, rtol=0)


@needs_node
def test_map_is_enlarged_as_in_gradcam(folder):
    maps = torch.randn(5, 7, 7, generator=torch.Generator().manual_seed(0))
    found = node(folder, "return given.maps.map(enlarge);", maps=maps.flatten(1).tolist())
    large = F.interpolate(maps.relu()[:, None], (28, 28), mode="bilinear", align_corners=False)
    torch.testing.assert_close(torch.tensor(found), large.flatten(1), atol=1e-6, rtol=0)


@needs_node
def test_painting_is_common_paint(folder):
    gray, _ = made_up_digits(10)
    gray = (gray.float() * torch.linspace(0, 1, 28)).to(torch.uint8)  # every shade, not only ink
    colours = common.rgb(common.PALETTE)
    found = node(
        folder,
        "return given.gray.map((digit, i) => paint(digit, given.colours[i], noise));",
        gray=gray.flatten(1).tolist(),
        colours=colours.tolist(),
    )
    expected = torch.cat([on_colours(g, c[None]) for g, c in zip(gray, colours, strict=True)])
    off = torch.tensor(found).mul(255).round() - expected.flatten(1).float()
    assert off.abs().max() <= 1  # a half is rounded up here, to even there
    assert off.count_nonzero() <= 5


def push(model, x, target, eps, steps=40):
    """The page's attack in torch: float (B,3,28,28) moved until the model answers `target`."""
    z = x.clone()
    for _ in range(steps):
        z.requires_grad_()
        logits = model(z)
        loss = F.cross_entropy(logits, torch.full((len(x),), target), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, z)
        waiting = (logits.argmax(1) != target).view(-1, 1, 1, 1)
        moved = z.detach() - eps / 10 * gradient.sign() * waiting
        z = moved.clamp(x - eps, x + eps).clamp(0, 1)
    return z


@needs_node
def test_fooling_agrees_with_torch(folder, models, pictures):
    """Inside its box and [0, 1], the answer is the one it claims, and torch gets about as far."""
    eps, x = 0.05, pictures[:10]
    code = """
        const all = given.pictures.map(numbers);
        return nets.map((net) => all.map((x) => fool(net, x, 3, given.eps)));
    """
    found = node(folder, code, pictures=x.flatten(1).tolist(), eps=eps)
    for model, ours in zip(models.values(), found, strict=True):
        moved = torch.tensor([one["picture"] for one in ours]).view_as(x)
        reached = torch.tensor([one["reached"] for one in ours])
        assert (moved - x).abs().max() <= eps + 1e-6
        assert moved.min() >= 0 and moved.max() <= 1
        assert torch.equal(common.predict(model, moved).argmax(1) == 3, reached)
        by_torch = push(model, x, 3, eps)
        assert ((common.predict(model, by_torch).argmax(1) == 3) != reached).sum() <= 1
        assert (moved - by_torch).abs().mean() < eps / 50  # a sign near 0 may differ
    assert 0 < sum(one["reached"] for ours in found for one in ours) < 3 * len(x)


@needs_node
def test_smallest_eps_is_the_first_that_works(folder, pictures):
    """Found by bisection, it is the first of the list that works; of none, nothing."""
    code = """
        const [x, list] = [numbers(given.picture), range(9).map((step) => step / 20)];
        const trials = range(5).map(async (target) => ({
          works: list.map((eps) => fool(nets[0], x, target, eps).reached),
          found: (await smallestEps(nets[0], x, target, list)) ?? null,
          zero: (await smallestEps(nets[0], x, target, [0])) ?? null,
        }));
        return Promise.all(trials);
    """
    for trial in node(folder, code, picture=pictures[0].flatten().tolist()):
        works = trial["works"]
        assert trial["found"] == (works.index(True) / 20 if True in works else None)
        assert trial["zero"] == (0 if works[0] else None)


@needs_node
def test_framing_is_mnist_framing(folder):
    """An L of any size: a box of 20 pixels, the centre of mass in the middle of the picture."""
    sizes = (6, 13, 27)
    strokes = [[[{"x": 1, "y": 0}, {"x": 1, "y": s}, {"x": 1 + s / 2, "y": s}]] for s in sizes]
    found = node(folder, "return given.strokes.map(frame);", strokes=strokes)
    middle = torch.arange(28) + 0.5
    for ink in torch.tensor(found).view(3, 28, 28):
        rows = ink.sum(1).nonzero()
        assert 19 <= rows.max() - rows.min() + 1 <= 21  # the pen's soft edge may touch a pixel more
        for axis in (0, 1):
            assert abs((ink.sum(axis) * middle).sum() / ink.sum() - 14) < 0.3
        assert (ink % 17 == 0).all()  # 16 grays, as the address keeps them


# ---- (b) the page in a browser


STEPS = """
    const log = [];
    const at = (selector, place = 0) => document.querySelectorAll(selector)[place];
    const pause = (ms = 500) => new Promise((then) => setTimeout(then, ms));
    const strip = () => [...document.querySelectorAll(".row")].slice(1).map((row) =>
      [...row.querySelectorAll(".tile:not([hidden])")].map((tile) => tile.textContent).join(""));
    const touch = (kind, [x, y], more = {}) => {
      const box = at("#pad").getBoundingClientRect();
      const place = { clientX: box.left + x * box.width, clientY: box.top + y * box.height };
      const pen = { ...place, isPrimary: true, bubbles: true, ...more };
      at("#pad").dispatchEvent(new PointerEvent(kind, pen));
    };
    const stroke = (points) => {
      touch("pointerdown", points[0]);
      for (const point of points) touch("pointermove", point);
      touch("pointerup", points.at(-1));
      return pause();
    };
"""


def dump(page, address, *more):
    """(page after its scripts ran, what its console said)."""
    flags = "--headless --no-sandbox --disable-gpu --virtual-time-budget=20000 --dump-dom"
    own = ["--enable-logging=stderr", *more, f"--user-data-dir={page.parent / 'profile'}"]
    command = [BROWSER, *flags.split(), *own, f"file://{page}#{address}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line]


def browse(folder, address, steps):
    """What `steps`, run inside a copy of the page, pushed into `log`; the console stays silent."""
    page = folder / "steps.html"
    run = f"(async () => {{ {STEPS} {steps} document.title = JSON.stringify(log); }})();"
    page.write_text(HTML.replace("</body>", f"<script>{run}</script></body>"), encoding="utf-8")
    html, said = dump(page, address)
    assert not said
    return json.loads(unescape(re.search("<title>(.*?)</title>", html, re.DOTALL)[1]))


def answers(models, gray, colours):
    """['0123456789', ...]: what each model answers to a digit on these colours."""
    pictures = on_colours(gray, colours)
    found = [common.predict(model, pictures).argmax(1).tolist() for model in models.values()]
    return ["".join(map(str, row)) for row in found]


def sample(folder, place):
    split = common.load_split(folder, "test_hard")
    digits = [(split.labels == d).nonzero()[:4, 0] for d in range(10)]
    return split.gray[torch.cat(digits)[place]]


@needs_browser
def test_page_shows_what_torch_answers(folder, models):
    """A state in the address: the strip, an own colour, the probabilities, the attack."""
    address = "digit=9&colour=ff8800&net=jitter_s42&target=5&eps=0.2"
    steps = """
        await pause();
        log.push(strip(), location.hash, at("#epsText").textContent, at("#saidBefore").textContent);
        log.push([...document.querySelectorAll(".bar")].map((bar) => bar.lastChild.textContent));
        at("#search").click();
        await pause(2000);
        log.push([...document.querySelectorAll("#smallest td")].map((cell) => cell.textContent));
    """
    strip, kept, eps, said, bars, smallest = browse(folder, address, steps)
    own = common.rgb({"own": "#ff8800"})
    gray = sample(folder, 9)
    assert strip == answers(models, gray, torch.cat([common.rgb(common.PALETTE), own]))
    chances = common.predict(models["jitter_s42"], on_colours(gray, own)).softmax(1)[0]
    assert bars == [f"{round(100 * c)} %" for c in chances.tolist()]
    assert (kept, eps, said) == (f"#{address}", "20 %", str(int(chances.argmax())))
    assert smallest[::2] == list(LABELS)
    assert all(re.fullmatch(r"(over )?[\d.]+ %", text) for text in smallest[1::2])


@needs_browser
def test_guess_comes_first(folder, models):
    """Without an address two unnamed networks answer one colour, then one more at each click.

    Before the choice a touch changes nothing.
    """
    steps = """
        await stroke([[0.3, 0.2], [0.7, 0.2]]);
        const row = (place) => at(".row", place).innerText.trim();
        log.push(strip(), row(1), at(".row", 3).offsetHeight, location.hash);
        at("#next").click();
        log.push(strip());
        at(".name", 2).click();
        await pause();
        log.push(strip(), row(1), at("#verdict").textContent);
    """
    first, name, third, address, second, last, named, verdict = browse(folder, "", steps)
    place, colour = demo(folder)["opening"].values()
    rows = answers(models, sample(folder, place), common.rgb(common.PALETTE))
    assert name.startswith("I trust A") and (third, address) == (0, "")
    for shown, count in ((first, 1), (second, 2)):
        for tiles, row in zip(shown[:2], rows, strict=False):
            assert len(tiles) - tiles.count("?") == count and tiles[colour] == row[colour]
            assert all(tile in ("?", answer) for tile, answer in zip(tiles, row, strict=True))
    assert last == rows
    assert verdict == "Well chosen. A: Lazy. B: Cured." and "Lazy" in named and "% right" in named


@needs_browser
def test_a_stroke_changes_the_strip(folder, models):
    """Drawn through the page's own handlers; undo, clear, a sample; the address brings it back."""
    steps = """
        await pause();
        log.push(strip());
        await stroke([[0.3, 0.2], [0.7, 0.2], [0.6, 0.5], [0.45, 0.85]]);
        log.push(strip(), location.hash);
        await stroke([[0.3, 0.5], [0.7, 0.5]]);
        log.push(location.hash);
        for (const click of ["#undo", "#clear", "#samples button"]) {
          at(click).click();
          await pause();
          log.push(location.hash);
        }
        location.hash = log[2];
        await pause();
        log.push(strip(), location.hash);
    """
    log = browse(folder, "digit=2&colour=red&net=baseline_s42", steps)
    before, after, once, twice, undone, cleared, sampled, *again = log
    gray, palette = read_drawing(once), common.rgb(common.PALETTE)
    assert 50 < gray.count_nonzero() < 300
    assert before == answers(models, sample(folder, 2), palette)
    assert after == answers(models, gray, palette) != before
    assert once == undone != twice
    assert "drawn=x784x&" in cleared and "digit=0&" in sampled
    assert again == [after, once]


@needs_browser
def test_one_pen_draws(folder):
    """A touch is a dot, a second finger draws nothing, an empty pad needs no second clearing."""
    steps = """
        await pause();
        at("#clear").click();
        at("#clear").click();
        at("#undo").click();
        await pause();
        log.push(location.hash);
        at("#clear").click();
        touch("pointerdown", [0.5, 0.5]);
        log.push([...at("#pad").getContext("2d").getImageData(280, 280, 1, 1).data]);
        touch("pointermove", [0.9, 0.9], { isPrimary: false });
        touch("pointerup", [0.9, 0.9]);
        await pause();
        log.push(location.hash);
    """
    undone, dotted, address = browse(folder, "digit=2&colour=red&net=baseline_s42", steps)
    assert "digit=2&" in undone
    assert dotted == [153, 153, 153, 255]
    columns = read_drawing(address).count_nonzero(0)
    assert columns.count_nonzero() <= 4  # as wide as the pen


def read_drawing(address):
    """Gray uint8 (28,28) of the drawn digit in an address."""
    hexadecimal = re.search(r"drawn=([0-9a-fx]+)", address)[1]
    hexadecimal = re.sub(r"x(\d+)x", lambda run: "0" * int(run[1]), hexadecimal)
    return torch.tensor([17 * int(gray, 16) for gray in hexadecimal]).byte().view(28, 28)


@needs_browser
def test_words(tmp_path):
    """At most 250 words in all: before the choice and after it, lists and tables counted."""
    shutil.copy(ROOT / "results" / "demo.js", tmp_path)
    steps = """
        for (const part of document.querySelectorAll(".first")) log.push(part.innerText);
        at(".name", 1).click();
        at("#search").click();
        await pause(2000);
        log.push(document.body.innerText);
    """
    texts = browse(tmp_path, "", steps) + [net["about"] for net in demo()["networks"]]
    assert 100 < len(re.findall(r"[^\W\d_]+", " ".join(texts))) <= 250


# ---- (c) without its data

ADVICE = "demo.js is missing or damaged; run: python gradcam.py --page"


@needs_browser
def test_without_its_data_the_page_says_what_to_run(folder, tmp_path):
    whole = (folder / "demo.js").read_text(encoding="utf-8")
    weights = demo(folder)["networks"][1]["weights"]
    short, frames = whole.replace(weights, weights[: len(weights) // 8 * 4]), ""
    for name, data in (("missing", None), ("cut", whole[: len(whole) // 2]), ("short", short)):
        (tmp_path / name).mkdir()
        shutil.copy(folder / "demo.html", tmp_path / name)
        frames += f'<iframe src="{name}/demo.html"></iframe>'
        if data is not None:
            (tmp_path / name / "demo.js").write_text(data, encoding="utf-8")
    read = """onload = () => { document.title = JSON.stringify(
        [...document.querySelectorAll("iframe")].map((f) => f.contentDocument.body.innerText)) }"""
    (tmp_path / "all.html").write_text(f"<body>{frames}<script>{read}</script></body>")
    html, _ = dump(tmp_path / "all.html", "", "--allow-file-access-from-files")
    said = json.loads(unescape(re.search("<title>(.*?)</title>", html, re.DOTALL)[1]))
    assert [text.strip() for text in said] == [ADVICE] * 3
