"""Job files that are no job: one error each, with file, place, value and what is allowed."""

import pytest
from bounds import Refuser
from cli_calls import JOB

GOOD = JOB.replace("\nname: t", "name: t")


def aliases(levels: int) -> str:
    """A "billion laughs": each list holds the one before it ten times."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


# What the whole file holds, and the words of its error.
FILES: dict[str, tuple[str | bytes, list[str]]] = {
    "aliases that multiply": (aliases(9), ["line 5, column 5: expands to more than 100000 values"]),
    "merge keys that multiply": (
        "a0: &a0 {k0: 1, k1: 1, k2: 1, k3: 1, k4: 1, k5: 1, k6: 1, k7: 1, k8: 1, k9: 1}\n"
        + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 8)),
        ["expands to more than 100000 values"],
    ),
    "an alias inside of itself": (GOOD + "x: &x [*x]\n", ["an alias inside of itself"]),
    "an alias of nothing": (GOOD + "x: *y\n", ["line 6, column 4: found undefined alias 'y'"]),
    "a key twice": (GOOD + "name: u\n", ["line 6, column 1: key 'name' is given twice", "line 1"]),
    "a nested key twice": (
        GOOD.replace("count: 8", "count: 8, count: 9"),
        ["line 3", "key 'count' is given twice"],
    ),
    "a key twice, quoted once": (GOOD + '"name": u\n', ["key 'name' is given twice"]),
    "a tag of Python's": (
        GOOD + "x: !!python/object/apply:os.system [touch outside]\n",
        ["line 6, column 4: could not determine a constructor", "python/object/apply:os.system"],
    ),
    "a name of Python's": (
        GOOD + "x: !!python/name:os.system\n",
        ["could not determine a constructor"],
    ),
    "a module of Python's": (
        GOOD + "x: !!python/module:antigravity\n",
        ["could not determine a constructor"],
    ),
    "a tag of one's own": (GOOD + "x: !job {}\n", ["could not determine a constructor", "!job"]),
    "lists in lists": ("[\n" * 50_000, ["nested too deeply"]),
    "mappings in mappings": ("{a: " * 50_000, ["nested too deeply"]),
    "nested by indent": ("".join(" " * i + "a:\n" for i in range(1300)), ["nested too deeply"]),
    "not UTF-8": (GOOD.encode() + b"x: \xff\xfe\n", ["line 6, column 4: byte 0xff is not UTF-8"]),
    "UTF-16": (GOOD.encode("utf-16"), ["byte 0xff is not UTF-8"]),
    "a NUL byte": (GOOD + "x: a\0b\n", ["line 6, column 5: character U+0000 is not allowed"]),
    "an escape character": (GOOD + "x: \x1b[2J\n", ["character U+001B is not allowed"]),
    "over 1 MB": (GOOD + "#" * 1_000_001, ["over 1 MB, which no job file is"]),
    "two documents": (GOOD + "---\nname: u\n", ["expected a single document", "another document"]),
    "text": ("a cat\n", ["text, where a mapping (KEY: VALUE) belongs"]),
    "a list": ("- name: t\n", ["a list, where a mapping"]),
    "a number": ("42\n", ["a whole number, where a mapping"]),
    "JSON that is cut off": ('{"name": "t", "model": {', ["line 1"]),
    "HTML": ("<!doctype html><title>Sign in</title>\n", ["text, where a mapping"]),
    "a PNG": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ["byte 0x89 is not UTF-8"]),
    "a number as key": (GOOD + "1: 2\n", ["key 1 is a whole number, where text belongs; quote it"]),
    "a huge number as key": (GOOD + f"? 0x{'f' * 9000}\n: 2\n", ["is a number of over 256 bits"]),
    "a list as key": (GOOD + "? [a, b]\n: 2\n", ["found unhashable key"]),
    "a date that is none": (GOOD + "x: 2024-13-45\n", ["'2024-13-45' does not fit timestamp"]),
    "base 64 that is none": (
        GOOD + "x: !!binary 'a'\n",
        ["line 6, column 4: failed to decode base64"],
    ),
    "a number of 5000 digits": (GOOD + f"x: {'9' * 5000}\n", ["does not fit int"]),
    "tabs": (GOOD + "x:\n\t- a\n", ["found character '\\t' that cannot start any token"]),
}


@pytest.mark.parametrize("case", FILES)
def test_file(refuse: Refuser, case: str) -> None:
    content, words = FILES[case]
    path = refuse.folder / "job.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    refuse("plan", "job.yaml", code=2, words=["job.yaml: ", *words])
    assert not (refuse.folder / "outside").exists()


# Keys of a job that is well-formed: what is set, and the words of its error.
VALUES: dict[str, tuple[str, list[str]]] = {
    "a number of hex digits without end": (
        f"prompts.count=0x{'f' * 9000}",
        ["prompts.count: value '0xfff", "is a number of over 256 bits"],
    ),
    "a seed past 64 bits": (
        f"sampling.seed={2**63}",
        ["sampling.seed: value 9223372036854775808: out of range", "0 to 2**63 - 1"],
    ),
    "a boolean as count": ("prompts.count=yes", ["value true: a boolean does not belong here"]),
    "a date as name": ("name=2024-01-01", ["name: value 2024-01-01: a date does not belong here"]),
    "base 64 as name": ("name=!!binary aGk=", ["name: value b'hi': binary does not belong here"]),
    "a set as options": ("prompts.options=!!set {a, b}", ["a set does not belong here"]),
    "infinity": ("sampling.guidance_scale=.inf", ["value Infinity: out of range"]),
    "NaN": ("sampling.strength=.nan", ["value NaN: out of range; allowed: a number from 0 to 1"]),
    "NaN in options": ("prompts.options={a: .nan}", ["infinity and NaN cannot be written"]),
    "a list as path": ("model.path=[a]", ['model.path: value ["a"]: a list does not belong here']),
    "a NUL byte in a path": ('model.path="a\\0b"', ["model.path: value 'a\\x00b': not a path"]),
    "a name that leads out": ("name=../../etc", ["name: value '../../etc': does not fit a file"]),
    "a name of options": ("name=-rf", ["name: value '-rf': does not fit a file name"]),
    "a name that is hidden": ("name=.ssh", ["name: value '.ssh': does not fit a file name"]),
    "a long name": (f"name={'a' * 65}", ["does not fit a file name", "1 to 64 of A-Z"]),
    "a name of two lines": ('name="a\\nb"', ["name: value 'a\\nb': does not fit a file name"]),
    "escapes in a name": ('name="\\e[2J"', ["name: value '\\x1b[2J': does not fit a file name"]),
    "a scheme": ("output.uri=http://h/x", ["unknown scheme http://; allowed: a path, s3://"]),
    "no bucket": ("output.uri=s3://", ["no bucket is named"]),
    "somebody's home": ("model.path=~nobody-here/x", ["no such user; allowed: ~ for your own"]),
    "a LoRA's name": (
        "model.loras={../x: {path: a.safetensors}}",
        ["name '../x': does not fit a file name"],
    ),
    "a huge image": ("sampling.width=2147483648", ["sampling.width: value 2147483648: out of ran"]),
    "no steps": ("sampling.num_inference_steps=0", ["value 0: out of range; allowed: a whole"]),
    "an unknown section": ("cluster={}", ["cluster: unknown key"]),
    "a key of object's": ("model.__class__=x", ["model.__class__: unknown key"]),
}


@pytest.mark.parametrize("case", VALUES)
def test_value(refuse: Refuser, case: str) -> None:
    assignment, words = VALUES[case]
    refuse("plan", "job.yaml", "--set", assignment, code=2, words=["--set: ", *words])


def test_files_that_are_none(refuse: Refuser) -> None:
    (refuse.folder / "folder.yaml").mkdir()
    (refuse.folder / "loop.yaml").symlink_to("loop.yaml")
    (refuse.folder / "zero.yaml").symlink_to("/dev/zero")
    for name, words in (
        ("folder.yaml", "folder.yaml: a folder, not a file"),
        ("loop.yaml", "loop.yaml: cannot be read: Too many levels of symbolic links"),
        ("zero.yaml", "zero.yaml: over 1 MB, which no job file is"),
        ("a" * 300 + ".yaml", "cannot be read: File name too long"),
    ):
        refuse("plan", name, code=2, words=[words])


EXTENDS = {
    "./job.yaml": "job.yaml: extends: a circle: job.yaml -> job.yaml",
    "./passwd.yaml": "passwd.yaml: text, where a mapping (KEY: VALUE) belongs",
    "/nowhere.yaml": "/nowhere.yaml: no such file",
    "[a]": 'job.yaml: extends: value ["a"]: a list does not belong here',
    "no-such": "job.yaml: extends: value 'no-such': no such preset; allowed: a shipped preset",
    '"a\\0b"': "job.yaml: extends: value 'a\\x00b': text does not belong here",
}


@pytest.mark.parametrize("name", EXTENDS)
def test_extends(refuse: Refuser, name: str) -> None:
    refuse.zimage.write("passwd.yaml", "root:x:0:0:root:/root:/bin/bash\n")
    refuse.zimage.write("job.yaml", f"extends: {name}\n{GOOD}")
    refuse("plan", "job.yaml", code=2, words=[EXTENDS[name]])


def test_chain_without_end(refuse: Refuser) -> None:
    for i in range(400):
        refuse.zimage.write(f"{i}.yaml", f"extends: ./{i + 1}.yaml\n")
    refuse.zimage.write("400.yaml", GOOD)
    refuse("plan", "0.yaml", code=2, words=["31.yaml: extends: a chain of over 32 files"])
