"""The words of `--data-path`, and mixture files."""

import json

import fsspec
import pytest

from megatron_vico.config.schema import DataOptions
from megatron_vico.data.shards.mixture import MixedFolder, read_mixture
from megatron_vico.errors import ConfigError


def folders(*words):
    return [(each.path, each.repeat) for each in read_mixture(words)]


@pytest.fixture
def write(tmp_path):
    """write(content) -> path of a mixture file."""

    def make(content):
        path = tmp_path / "mixture.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return make


def test_folders_with_and_without_a_repeat():
    assert folders("/a", "/b") == [("/a", 1.0), ("/b", 1.0)]
    assert folders("0.5", "/a", "2", "/b") == [("/a", 0.5), ("/b", 2.0)]
    mixed = [("/a", 1.0), ("b", 2.0), ("s3://bucket/c", 1.0)]
    assert folders("/a", "2", "b", "s3://bucket/c") == mixed
    assert read_mixture(()) == ()
    assert read_mixture(("1e-1", "/a")) == (MixedFolder(path="/a", repeat=0.1),)


def test_a_mixture_file_is_relative_to_itself_and_multiplied(write, tmp_path):
    listed = [
        {"path": "docs", "repeat": 0.5},
        {"path": "charts"},
        {"path": "s3://bucket/video", "repeat": 3},
    ]
    path = write({"version": 1, "folders": listed})
    expected = [
        (str(tmp_path / "docs"), 0.5),
        (str(tmp_path / "charts"), 1.0),
        ("s3://bucket/video", 3.0),
    ]
    assert folders(path) == expected
    assert folders("2", path, "/more") == [
        *((name, 2 * repeat) for name, repeat in expected),
        ("/more", 1.0),
    ]


def test_a_mixture_file_is_found_from_the_working_directory(write, tmp_path, monkeypatch):
    write({"version": 1, "folders": [{"path": "docs"}]})
    monkeypatch.chdir(tmp_path)
    assert folders("mixture.json") == [("docs", 1.0)]
    monkeypatch.chdir(tmp_path.parent)
    assert folders(f"{tmp_path.name}/mixture.json") == [(f"{tmp_path.name}/docs", 1.0)]


def test_a_remote_mixture_file_is_relative_to_its_url():
    with fsspec.open("memory://mix/mixture.json", "w") as file:
        json.dump({"version": 1, "folders": [{"path": "docs", "repeat": 2}]}, file)
    assert folders("memory://mix/mixture.json") == [("memory://mix/docs", 2.0)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["0", "/a"], r"a folder cannot come 0 times an epoch; give a number above 0.*\./0\)"),
        (["-1", "/a"], "cannot come -1 times"),
        (["nan", "/a"], "cannot come nan times"),
        (["inf", "/a"], "cannot come inf times"),
        (["/a", "0.5"], "no folder after 0.5"),
        (["0.5", "2", "/a"], "2 comes after another number"),
        (["/a", "/b", "/a/"], "/a/ is the same folder as /a"),
        (["s3://x/a", "2", "s3://x/a/"], "s3://x/a/ is the same folder as s3://x/a"),
        (["/no/such/mixture.json"], "cannot be read as a mixture"),
        (["nothing://a/m.json"], "nothing://a: fsspec cannot open it: Protocol not known"),
    ],
)
def test_what_makes_no_sense_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        read_mixture(words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"version": 2, "folders": []}, "mixture version 2, expected 1"),
        ({"folders": []}, "cannot be read as a mixture .*version"),
        ("[", "cannot be read as a mixture"),
        ("[1]", "cannot be read as a mixture"),
        ({"version": 1, "folders": ["a"]}, "cannot be read as a mixture"),
        (
            {"version": 1, "folders": [{"path": "a", "repeat": 0}]},
            "folder 'a' has repeat 0; expected a number above 0",
        ),
        ({"version": 1, "folders": [{"path": "a", "repeat": "2"}]}, "folder 'a' has repeat '2'"),
        ({"version": 1, "folders": [{"path": "a", "repeat": True}]}, "folder 'a' has repeat True"),
        ({"version": 1, "folders": [{"path": "a"}, {"path": "a"}]}, "is the same folder as"),
    ],
)
def test_a_mixture_file_that_makes_no_sense_is_refused(write, content, message):
    with pytest.raises(ConfigError, match=message):
        read_mixture([write(content)])


@pytest.mark.parametrize("name", ["../a", "/a", "a/b", "", "..", "a\x1b[2J", 3, None])
def test_a_mixture_file_names_no_folder_elsewhere(write, name):
    with pytest.raises(ConfigError, match="expected the name of a folder beside the file, or a U"):
        read_mixture([write({"version": 1, "folders": [{"path": name}]})])


@pytest.mark.parametrize("url", ["other://a/b", "zip://b::s3://a", "s3://a::other://b"])
def test_other_schemes_are_read_where_the_user_says_so(write, url):
    path = write({"version": 1, "folders": [{"path": url}]})
    with pytest.raises(ConfigError, match=r"is not among .*--data-url-schemes (other|zip)"):
        read_mixture([path])
    options = DataOptions(data_url_schemes=("other", "zip"))
    assert read_mixture([path], options=options)[0].path == url
    assert folders(url) == [(url, 1.0)], "the user's own word"


def test_the_folder_that_holds_a_mixture_is_not_taken_for_shards(write, tmp_path):
    path = write({"version": 1, "folders": [{"path": "docs"}]})
    message = rf"--valid-data-path {tmp_path}: no shards, .*did you mean {path}\?"
    with pytest.raises(ConfigError, match=message):
        read_mixture([str(tmp_path)], flag="--valid-data-path")
    (tmp_path / "index.json").touch()  # a folder of shards may have any other file beside them
    assert folders(str(tmp_path)) == [(str(tmp_path), 1.0)]
