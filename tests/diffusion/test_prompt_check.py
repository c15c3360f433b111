"""Two classes whose prompts have equal tokens are refused, for every family of pipelines, and no others."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import pipelines
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from warmfed.core import GeneratorSpec, prompt, prompts_of
from warmfed.diffusion import pipeline
from warmfed.diffusion.concept_inversion import Concepts
from warmfed.diffusion.generator import LatentDiffusion
from warmfed.diffusion.prompt_check import check_prompts, readers
from warmfed.runs.generators import build_generator
from warmfed.utils.errors import InputError

LONG = "a dermoscopy photograph of a skin lesion diagnosed as {}"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: pipelines.write(kind, folder / kind) for kind in ("sd15", "sdxl", "sana")}


def check(base: str, classes: Sequence[str], template: str, sites: Sequence[str] = ("a",)) -> None:
    prompts = [prompt(template, name) for name in classes]
    check_prompts(base, classes, {site: prompts_of(site, prompts) for site in sites})


@pytest.mark.parametrize(
    ("classes", "template", "words"),
    [
        (
            ("犬", "猫"),
            "a photo of a {}",
            r"classes '犬' and '猫' have the same prompt for the base digits: the letters 犬 猫 of",
        ),
        (("cat", "犬", "猫"), "a photo of a {}", "classes '犬' and '猫'"),
        (("кот", "пёс"), "a photo of a {}", "letters .* rename the classes with the letters a to z"),
        (("café", "cafö"), "{} photo", "letters é ö of"),
        (("melanoma", "nevus"), LONG, "it reads 16 tokens, and .* differ only after this cut; shorten data.options.template"),
        (("Cat", "cat"), "a photo of a {}", "differ only in what its tokenizer ignores, such as capital letters"),
        (("a  b", "a b"), "a photo of a {}", "differ only in what its tokenizer ignores"),
        (("e\u0301", "é"), "a photo of a {}", "have the same prompt"),
    ],
)
def test_classes_that_the_embedded_base_reads_alike_are_refused(classes: tuple[str, ...], template: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        check("digits", classes, template)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("classes", "template"),
    [
        (("melanoma", "nevus"), "a photo of a {}"),
        (("犬", "cat"), "a photo of a {}"),
        (("nevus", "melanoma"), "{} " + LONG[:-3]),
    ],
)
def test_classes_that_it_tells_apart_are_not(classes: tuple[str, ...], template: str) -> None:
    check("digits", classes, template)


def test_the_site_is_named_if_only_its_prompts_are_alike() -> None:
    template = "a {site|far=photograph from a hospital far away} of {}"
    with pytest.raises(InputError, match="for the base digits at site 'far': it reads 16 tokens"):
        check("digits", ("cat", "dog"), template, ("a", "far"))
    check("digits", ("cat", "dog"), template, ("a",))


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sana"])
def test_every_family_has_its_own_cut(kind: str, bases: dict[str, str]) -> None:
    most = {"sd15": 24, "sdxl": 24, "sana": 77}[kind]
    check(bases[kind], ("cat", "dog"), "a " * 3 + "{}")
    with pytest.raises(InputError, match=f"it reads {most} tokens, and .* differ only after this cut"):
        check(bases[kind], ("cat", "dog"), "a " * 80 + "{}")
    with pytest.raises(InputError, match="have the same prompt"):
        check(bases[kind], ("cat", "Cat"), "a {}")


def test_with_two_tokenizers_both_must_read_alike(bases: dict[str, str], tmp_path: Path) -> None:
    base = Path(pipelines.write("sdxl", tmp_path / "sdxl"))
    file = base / "tokenizer_2" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 12}))
    for template, alike in (("a " * 5 + "{}", False), ("a " * 15 + "{}", False), ("a " * 25 + "{}", True)):
        if alike:
            with pytest.raises(InputError, match="it reads 24 tokens"):
                check(str(base), ("cat", "dog"), template)
        else:
            check(str(base), ("cat", "dog"), template)
    assert [reader.read(["a"]).shape[1] for reader in readers(str(base))] == [24, 12]


def test_learned_prompts_and_concepts_are_refused_too() -> None:
    """They begin as the embedded prompts."""
    for spec in (GeneratorSpec("prompts"), GeneratorSpec("adapter"), GeneratorSpec("concepts", signal=0.01)):
        generator = build_generator(LatentDiffusion("digits"), spec)
        assert isinstance(generator, LatentDiffusion | Concepts)
        with pytest.raises(InputError, match="classes '犬' and '猫'"):
            generator.check_prompts(("犬", "猫"), {"a": ("a photo of a 犬", "a photo of a 猫")})


def test_a_known_pipeline_without_files_is_not_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    check("stable-diffusion-v1-5/stable-diffusion-v1-5", ("cat", "Cat"), "{}")
    with pytest.raises(InputError, match="expected a pipeline folder"):
        check("nobody/nothing", ("cat", "dog"), "{}")


def test_a_damaged_tokenizer_is_one_line(tmp_path: Path) -> None:
    base = Path(pipelines.write("sd15", tmp_path / "base"))
    for file in (base / "tokenizer").iterdir():
        if file.name != "tokenizer_config.json":
            file.write_text("{}")
    with pytest.raises(InputError, match="cannot load tokenizer of") as error:
        check(str(base), ("cat", "dog"), "a {}")
    assert len(str(error.value).splitlines()) == 1


@functools.cache
def plain() -> Tokenizer:
    return Tokenizer.from_file(str(pipeline.find("digits") / "tokenizer" / "tokenizer.json"))


WORD = st.text(st.sampled_from("abAB 1-_éñ犬猫🐕\u0301|<>{"), min_size=1, max_size=6)
BEFORE = st.sampled_from(["", "a ", "a photo of a ", "a dermoscopy photo of a ", LONG[:-2], "犬 "])
AFTER = st.sampled_from(["", " photo", ", 3 mm", " 猫"])


@given(classes=st.lists(WORD, min_size=2, max_size=5, unique=True), before=BEFORE, after=AFTER)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_refused_if_and_only_if_two_rows_are_equal(classes: list[str], before: str, after: str) -> None:
    """Against the library `tokenizers` on the base's own file."""
    prompts = [before + name + after for name in classes]
    rows = {tuple(plain().encode(text).ids) for text in prompts}
    try:
        check_prompts("digits", classes, {"a": prompts})
    except InputError as error:
        if len(rows) == len(classes) or "\n" in str(error):
            raise
    else:
        assert len(rows) == len(classes)
