"""fastvae.report: what the metrics say, of a model that stays as it was, on a page that a browser shows."""

from __future__ import annotations

import base64
import copy
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvae

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from browser import check_page, measured_page

from fastvae.data import ImageDataset
from fastvae.models import HVAE, IWAE, VAE, BaseVAE
from fastvae.report import Picture, Section, Subject, Table, as_text, sections_of, write_page, write_report
from fastvae.report.evidence import importance_samples
from fastvae.report.foreign import outlier_scores
from fastvae.report.influence import Influences, influences_of
from fastvae.report.labels import auroc, suspicious_labels
from fastvae.report.pictures import neighbour_accuracy
from fastvae.report.speed import timed
from fastvae.report.wording import estimated, nats

EFFORT = 0.02
TITLES = [
    "Samples",
    "Reconstructions",
    "Bound and likelihood",
    "Latents",
    "Influence of training images",
    "Suspicious labels",
    "Foreign images",
    "Speed",
    "Training",
    "What was looked at",
]


# Other tests may be running beside these.
pytestmark = pytest.mark.usefixtures("one_thread_for_a_module")


def data(
    count: int, shape: tuple[int, ...] = (1, 8, 8), seed: int = 0, *, labelled: bool = True
) -> ImageDataset:
    """Bars, upright or lying by their label, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    images = torch.randint(0, 90, (count, *shape), generator=generator, dtype=torch.uint8)
    places = torch.randint(shape[1], (count,), generator=generator)
    for image, label, place in zip(images, labels, places, strict=True):
        (image[:, place] if label else image[:, :, place % shape[2]]).fill_(250)
    return ImageDataset(images, labels if labelled else None, "bars")


def trained(kind: type[BaseVAE] = VAE, shape: tuple[int, ...] = (1, 8, 8), **options: object) -> BaseVAE:
    size = torch.Size(shape).numel()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(size, 16), nn.Tanh(), nn.Linear(16, 6))
        decoder = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, size))
        model = kind(encoder, decoder, **options)  # type: ignore[arg-type]
    batches = data(120, shape).tensors()[0].round().split(40)
    fastvae.fit(model, batches, epochs=10, progress=False)
    model.zero_grad()
    return model


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything: labels, foreign images, a history."""
    folder = tmp_path_factory.mktemp("report")
    history = fastvae.History([3.0, 2.0], [3.5, None], [0.1, 0.1], [1e-3] * 2, [5, 10], [0, 0])
    foreign = [data(30, (3, 5, 9), 7), ImageDataset(data(20, seed=5).images.flip(0), name="a/b/bars")]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        return write_report(
            trained(), data(120), data(40, seed=1), folder / "deep" / "er",
            foreign=foreign, history={"training": history, "not begun": fastvae.History()},
            command="report <RUN>", effort=EFFORT, progress=False,
        )  # fmt: skip


class Reader(HTMLParser):
    """What a reader without JavaScript sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.titles: list[str] = []
        self.images: list[bytes] = []
        self.tags: set[str] = set()
        self.words = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("img", "meta"):
            self.open.append(tag)
        if tag == "img":
            values = dict(attributes)
            source = values["src"] or ""
            assert values["alt"] and source.startswith("data:image/png;base64,")
            self.images.append(base64.b64decode(source.partition(",")[2]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "every element is closed, in order"

    def handle_data(self, data: str) -> None:
        self.words += data
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)


def test_every_section_is_on_the_page(page: Path) -> None:
    assert page.name == "index.html"
    text = page.read_text(encoding="utf-8")
    reader = Reader(text)
    assert sorted(reader.titles) == sorted(TITLES) and reader.open == []
    assert reader.tags.isdisjoint({"script", "link", "iframe"}) and "http" not in text
    assert len(reader.images) == 11 and all(image.startswith(b"\x89PNG") for image in reader.images)
    for word in ("report <RUN>", "VAE on bars", "120 of 120", fastvae.__version__, torch.__version__):
        assert word in reader.words
    assert "could not" not in reader.words
    contents = text[text.index("<nav") : text.index("</nav>")]
    assert re.findall(r'href="#([\w-]+)"', contents) == re.findall(r'<section id="([\w-]+)"', text)


def test_a_browser_shows_all_of_it(page: Path, tmp_path: Path) -> None:
    check_page(page, tmp_path, TITLES)


def test_a_browser_sees_faults(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<!DOCTYPE html><html><body><h2>t</h2><p style='width: 80px'><b style='display:block;width:600px'>wide</b></p>"
        "<img alt='a' src='data:image/png;base64,'><a href='#gone'>x</a>"
        "<script>console.error('broken'); undefined.x</script></body></html>"
    )
    found = measured_page(page, 500, tmp_path)
    assert found["scrolled"] >= 600 and any("wide" in each for each in found["overflowing"])
    assert found["images"] == [[0, "a"]] and found["dangling"] == ["#gone"] and len(found["console"]) == 2


def test_the_model_and_the_generators_stay_as_they_were(tmp_path: Path) -> None:
    model = trained().train()
    state, before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    path = write_report(
        model,
        data(30, labelled=False),
        data(12, seed=1, labelled=False),
        tmp_path,
        effort=EFFORT,
        progress=False,
    )
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    titles = Reader(path.read_text(encoding="utf-8")).titles
    assert sorted(titles) == sorted(set(TITLES) - {"Training", "Suspicious labels"})


def test_figures_are_those_of_the_metrics() -> None:
    model, test = trained(), data(40, seed=1)
    subject = Subject.of(model, data(120), test, effort=EFFORT, seed=3)
    assert subject.is_binarised and subject.is_binary and subject.test.shape == (40, 1, 8, 8)
    sections = {section.title: section for section in sections_of(subject)}
    tables = {
        title: dict((row[0], row[1]) for row in section.table.rows)
        for title, section in sections.items()
        if section.table
    }
    active = fastvae.metrics.active_units(model.eval(), subject.test)
    assert tables["Latents"]["active units (Var of the mean > 0.01)"] == f"{active} of 3"
    samples = int(
        re.search(r"sampling with (\d+) samples", " ".join(sections["Bound and likelihood"].text))[1]
    )  # type: ignore[index]
    score = fastvae.ood.NegativeLogLikelihood(model, num_samples=samples, seed=3)(subject.test)
    mean, error = float(-score.double().mean()), float(score.double().std()) / 40**0.5
    shown = tables["Bound and likelihood"]["log p(x)"].replace("−", "-").split(" ± ")
    assert float(shown[0]) == pytest.approx(mean, abs=0.01) and float(shown[1]) == pytest.approx(
        error, abs=0.01
    )
    share = subject.train.mean(0) * len(subject.train) + 0.5
    pixels = (
        torch.distributions.Bernoulli(share / (len(subject.train) + 1))
        .log_prob(subject.test)
        .flatten(1)
        .sum(1)
    )
    alone = tables["Bound and likelihood"]["pixels independent"].replace("−", "-").split(" ± ")
    assert float(alone[0]) == pytest.approx(float(pixels.mean()), abs=0.01)
    assert "Speed" in sections and "100% of the decoder runs in kernels" in sections["Speed"].verdict


@pytest.mark.parametrize(
    ("kind", "options", "shape"),
    [
        (HVAE, {"num_steps": 2}, (1, 8, 8)),
        pytest.param(IWAE, {"num_samples": 3}, (1, 8, 8), marks=pytest.mark.slow),
        (VAE, {"likelihood": "gaussian"}, (3, 5, 7)),
        pytest.param(fastvae.JacobianL1VAE, {"gamma": 0.1}, (1, 8, 8), marks=pytest.mark.slow),
    ],
)
def test_other_models(kind: type[BaseVAE], options: dict[str, object], shape: tuple[int, ...]) -> None:
    subject = Subject.of(trained(kind, shape, **options), data(30, shape), data(12, shape, 1), effort=EFFORT)
    assert subject.is_binarised == ("likelihood" not in options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        titles = [section.title for section in sections_of(subject)]
    assert ("Trajectories" in titles) == (kind is HVAE) and titles[-1] == "What was looked at"


def test_both_ways_that_are_timed_agree() -> None:
    for kind in (VAE, HVAE, IWAE):
        found, failed = timed(Subject.of(trained(kind).double(), data(20), data(20, seed=1), effort=1e-9))
        names = [each.name for each in found]
        assert not failed and ("training step" in names) == (kind is not HVAE) and len(names) >= 4
        # Images are float32 and the rest float64, sums in another order: the operators' own tests have 1e-10.
        assert all(each.difference < 1e-9 for each in found if each.difference == each.difference)


def test_wrong_labels_are_found() -> None:
    """By hand: each image's proponents are those of its own kind."""
    labels = torch.arange(40) % 2
    scores = torch.where(labels[:, None] == labels[None], 1.0, -1.0) + 0.01 * torch.eye(40)
    wrong = torch.zeros(40, dtype=torch.bool)
    wrong[[3, 8]] = True
    given = torch.where(wrong, 1 - labels, labels)
    images = ImageDataset(data(40).images, given, "bars")
    subject = Subject.of(trained(), images, data(10), effort=EFFORT)
    # The subject chooses at random: scores in its order.
    order = subject.train_indices
    assert torch.equal(subject.train_labels, given[order])
    found = Influences(40, scores[order][:, order], scores[:5], 0)
    section = suspicious_labels(subject, found, wrong=wrong)
    assert section is not None
    assert (
        "Of 2 labels that were made wrong on purpose 2 are among the 2 most suspicious: AUROC 1.000"
        in section.verdict
    )
    plain = suspicious_labels(subject, found)
    assert plain is not None and plain.verdict.startswith("2 of 40 labels look wrong")


def test_influences_are_tracins() -> None:
    model = trained()
    subject = Subject.of(model, data(30), data(10, seed=1), effort=EFFORT)
    found = influences_of(subject)
    train = subject.train[: found.count]
    tracin = fastvae.influence.TracIn(model, train, [None], lambda model, checkpoint: 1.0, num_samples=16)
    torch.testing.assert_close(found.own, tracin.self_influence())
    torch.testing.assert_close(found.on_test, tracin.influence(subject.test[:5]))
    assert not bool((found.proponents() == torch.arange(found.count)[:, None]).any())


def test_scores_are_the_detectors() -> None:
    model = trained()
    subject = Subject.of(
        model, data(30), data(10, seed=1), foreign={"noise": data(10, seed=2)}, effort=EFFORT
    )
    scores = outlier_scores(subject, {"test": subject.test, **subject.foreign})
    assert list(scores) == ["regret", "NLL", "complexity"] and list(scores["NLL"]) == ["test", "noise"]
    assert auroc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])) == 0.875


def test_what_the_nearest_neighbour_says() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 200, 6, generator=generator)
    assert neighbour_accuracy(first, second + 9) == 1.0
    # A fair coin of 400 throws, which are not independent: four standard deviations.
    assert neighbour_accuracy(first, second) == pytest.approx(0.5, abs=0.1)
    same = torch.zeros(5, 2)
    assert neighbour_accuracy(same, same) == pytest.approx(4 / 9)


def test_what_cannot_be_computed_costs_one_section() -> None:
    class NoSamples(fastvae.Bernoulli):
        def sample(self, params: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
            raise NotImplementedError("no samples")

    model = trained()
    model.likelihood = NoSamples()
    subject = Subject.of(model, data(20), data(10, seed=1), effort=EFFORT)
    with pytest.warns(RuntimeWarning, match="Samples could not be computed: NotImplementedError: no samples"):
        sections = sections_of(subject)
    assert sections[0].worked is False and sections[0].text == ["NotImplementedError: no samples"]


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.123, "0.12"), (-12.34, "−12.3"), (-1135.0, "−1.1k"), (27000.0, "27.0k"), (-1135000.0, "−1135k")],
)
def test_scores_fit_below_an_image(value: float, words: str) -> None:
    assert nats(value) == words


def test_estimates_have_the_digits_that_their_error_leaves() -> None:
    found = [
        fastvae.metrics.Estimate(*pair)
        for pair in ((-97.456, 0.23), (2824.4, 293.0), (0.1, 0.0004), (5.0, 0.0))
    ]
    assert [estimated(each) for each in found] == [
        "−97.46 ± 0.23",
        "2,824 ± 293",
        "0.10000 ± 0.00040",
        "5.00 ± 0.00",
    ]


def test_pages_escape_align_and_order(tmp_path: Path) -> None:
    sections = [
        Section("Last", "Settings.", is_appendix=True),
        Section("Lost", "Nothing gained.", False),
        Section("a < b", "x &\n   y", None, ["<b>"], Table(["", "n"], [["<i>", "1"], ["longer", "22"]])),
        Section("Won", "Much.", True, pictures=[Picture(b"png", 'a "b"')], details=[("more", "a  b")]),
    ]
    write_page(tmp_path / "page.html", "t & u", "lead", sections)
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*)</h2>", html) == ["Won", "a &lt; b", "Lost", "Last"]
    assert "x &amp; y" in html and "&lt;i&gt;" in html and "<i>" not in html and "<b>" not in html
    assert 'alt="a &#34;b&#34;"' in html and '<td class="number">22</td>' in html
    assert as_text(sections[2]).splitlines()[2:] == ["x & y", "         n", "<i>      1", "longer  22"]


def test_pages_of_names_that_are_no_text(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", "pi\udcff", "Lead.", [Section("A", "B.", True)])
    assert "<title>pi?</title>" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"effort": 0}, ValueError, "write_report: effort: expected a finite number above 0, got 0"),
        ({"model": nn.Linear(1, 1)}, TypeError, "write_report: model: expected a fastvae model, got Linear"),
        (
            {"train": torch.rand(3, 1, 8, 8)},
            TypeError,
            "train: expected an ImageDataset or a TableDataset, got Tensor; fastvae.data.load",
        ),
        (
            {"foreign": torch.rand(3, 1, 8, 8)},
            TypeError,
            "foreign: expected an ImageDataset or a TableDataset, got Tensor",
        ),
        ({"foreign": {"a": "b"}}, TypeError, "foreign: expected an ImageDataset or a TableDataset, got str"),
        ({"history": "history.json"}, TypeError, "history: expected a History, .* got str"),
        ({"seed": 0.5}, ValueError, "seed: expected an int, got 0.5"),
        (
            {"train": data(3, (1, 9, 9)), "test": data(3, (1, 9, 9))},
            ValueError,
            r"train: expected images that the model takes, got \[1, 9, 9\]: ",
        ),
        ({"test": data(3, (1, 8, 9))}, ValueError, r"test: expected images of \[1, 8, 8\] as in train"),
    ],
)
def test_what_does_not_fit_is_said(
    tmp_path: Path, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    given: dict[str, object] = {"model": trained(), "train": data(3), "test": data(3), **arguments}
    with pytest.raises(error, match=message):
        write_report(folder=tmp_path, progress=False, **given)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    model = trained()
    nn.init.constant_(model.decoder[0].weight, torch.nan)
    with pytest.raises(ValueError, match="write_report: model: expected finite parameters"):
        write_report(model, data(3), data(3), tmp_path, progress=False)


def test_a_frozen_model_costs_what_asks_for_gradients() -> None:
    subject = Subject.of(trained().requires_grad_(False), data(20), data(9, seed=1), effort=1e-9)
    found, failed = timed(subject)
    assert (
        "log p(x | z) of 20 codes" in [each.name for each in found]
        and "self-influence of 16 images" in failed
    )


class Labelled(nn.Module):
    """A network that is given a label, too."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.labels = nn.Embedding(2, 4)
        self.layers = nn.Sequential(nn.Linear(inputs + 4, 16), nn.Tanh(), nn.Linear(16, outputs))

    def forward(self, given: Tensor, label: Tensor) -> Tensor:
        return self.layers(torch.cat((given.flatten(1), self.labels(label)), 1))


def conditional(kind: type[BaseVAE] = VAE) -> BaseVAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(Labelled(64, 6), Labelled(3, 64), latent_dim=3)


@pytest.mark.parametrize("kind", [VAE, HVAE])
def test_a_conditional_model(kind: type[BaseVAE], tmp_path: Path) -> None:
    """Every section of a model that is given labels; as tensors, they make the same page."""
    train, test = data(60), data(30, seed=1)
    foreign = {"others": data(20, seed=2)}
    with warnings.catch_warnings():
        # Not that its embeddings are run by PyTorch, of which operators warn once.
        warnings.filterwarnings("error", "write_report", RuntimeWarning)
        warnings.filterwarnings("ignore", "log_px", RuntimeWarning)
        page = write_report(
            conditional(kind),
            train,
            test,
            tmp_path,
            condition="labels",
            foreign=foreign,
            effort=EFFORT,
            progress=False,
        )
    text = page.read_text(encoding="utf-8")
    failed = re.compile("could not be (?:computed|compared)")
    assert [part for part in text.split("<") if failed.search(part)] == []
    assert "given a condition, a number for each image" in text
    assert train.labels is not None and test.labels is not None
    pair = train.labels, test.labels
    subjects = [
        Subject.of(conditional(kind), train, test, condition=each, effort=EFFORT) for each in ("labels", pair)
    ]
    scores = [outlier_scores(each, {"test": each.test})["NLL"]["test"] for each in subjects]
    assert torch.equal(*scores)
    # Of the rows that were chosen, and not of others.
    subject = subjects[0]
    assert subject.test_condition is not None and subject.test_labels is not None
    assert torch.equal(subject.test_condition, subject.test_labels)
    few, samples = len(scores[0]), min(200, importance_samples(subject, len(scores[0])))
    own = fastvae.ood.NegativeLogLikelihood(conditional(kind).eval(), num_samples=samples, seed=0)
    assert torch.equal(scores[0], own(subject.test[:few], condition=subject.test_labels[:few]))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (None, "condition: expected one for a conditional model"),
        ("names", "condition: expected \"labels\" or two tensors, got 'names'"),
        ((torch.zeros(3), torch.zeros(4)), "expected 3 rows, one a test sample, got \\[4\\]"),
    ],
)
def test_conditions_that_do_not_fit(tmp_path: Path, condition: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_report(conditional(), data(3), data(3), tmp_path, condition=condition, progress=False)
    with pytest.raises(ValueError, match="expected data with labels"):
        unlabelled = data(3, labelled=False)
        write_report(conditional(), unlabelled, unlabelled, tmp_path, condition="labels", progress=False)
    assert list(tmp_path.iterdir()) == []
