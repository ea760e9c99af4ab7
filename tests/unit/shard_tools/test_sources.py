"""Each kind of source gives the samples that it holds, and says what is wrong with it and where."""

import io
import json
import tarfile

import pytest
from PIL import Image

from megatron_vico.data.encode.sample_encoder import SampleEncoder
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.shard_tools.lines import cut_lines, read_lines
from megatron_vico.shard_tools.options import FrameOptions
from megatron_vico.shard_tools.sample_reader import SampleReader, TarMembers
from megatron_vico.shard_tools.sources import Source, read_meta
from tests.unit.conftest import SETTINGS


def picture(colour=(200, 30, 30), size=(32, 32), kind="PNG"):
    written = io.BytesIO()
    Image.new("RGB", size, colour).save(written, kind)
    return written.getvalue()


def row(question="What?", *, answer="red", **media):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps({**media, "conversations": turns}).encode()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def new_reader(tokenizer):
    encoder = SampleEncoder(tokenizer=tokenizer, settings=SETTINGS)
    return SampleReader(encoder=encoder, frames=FrameOptions())


@pytest.fixture
def reader(tokenizer):
    return new_reader(tokenizer)


def source(tmp_path, root=None, **fields):
    return Source(name="set.a", annotation=tmp_path / "a.jsonl", root=root or tmp_path, **fields)


def test_images_in_tars_are_read_at_their_place(tmp_path, reader):
    red, blue = picture(), picture((0, 0, 255))
    write_tar(tmp_path / "one.tar", {"./in/r\u00f6d.png": red, "b.PNG": blue})
    write_tar(tmp_path / "two.tar", {"in/r\u00f6d.png": blue})
    line = row("<image><image>", image=["one.tar/in/r\u00f6d.png", "two.tar/in/r\u00f6d.png"])
    read = reader.read(line, source=source(tmp_path), number=7)
    assert read.sample.images == (red, blue)
    assert read.sample.key == read.encoded.key == "set_a-00000007"
    in_tar = source(tmp_path, root=tmp_path / "one.tar")
    read = reader.read(row(image="b.PNG"), source=in_tar, number=1)
    assert (read.sample.images, read.suffixes) == ((blue,), ("png",))


def test_every_member_of_a_tar_is_found(tmp_path):
    contents = {f"{'long/' * 40}{i}.bin": bytes([i]) * (i * 100) for i in range(20)}
    write_tar(tmp_path / "a.tar", contents)
    tars = TarMembers()
    assert {name: tars.read(tmp_path / "a.tar", name) for name in reversed(contents)} == contents


def test_a_folder_named_like_a_tar_is_a_folder(tmp_path, reader):
    (tmp_path / "x.tar").mkdir()
    (tmp_path / "x.tar" / "a.png").write_bytes(picture())
    read = reader.read(row(image="x.tar/a.png"), source=source(tmp_path), number=1)
    assert read.sample.images == (picture(),)


def test_what_is_missing_in_a_tar_or_wrong_with_it_is_named(tmp_path, reader):
    write_tar(tmp_path / "good.tar", {"a.png": picture()})
    message = r"^missing file: .*a.jsonl:3: .*good.tar has no member 'in/b.png'"
    with pytest.raises(SampleError, match=message):
        reader.read(row(image="good.tar/in/b.png"), source=source(tmp_path), number=3)
    (tmp_path / "cut.tar").write_bytes((tmp_path / "good.tar").read_bytes()[:530])
    (tmp_path / "text.tar").write_text("no tar " * 200)
    with pytest.raises(SampleError, match=r"cut.tar (is no complete tar|ends inside)"):
        reader.read(row(image="cut.tar/a.png"), source=source(tmp_path), number=1)
    for _ in range(2):  # what is known to be broken is not scanned again
        with pytest.raises(SampleError, match=r"text.tar is no complete tar file"):
            reader.read(row(image="text.tar/a.png"), source=source(tmp_path), number=1)
        (tmp_path / "text.tar").touch()


def frames_of(tmp_path, name="clip", number=40):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    for i in range(number):
        (folder / f"{i}.png").write_bytes(picture((i, 0, 0), size=(64, 32)))


def test_a_video_is_its_frames_one_tile_each(tmp_path, reader, tokenizer):
    frames_of(tmp_path)
    line = row("<video>\nWhat?", video="clip")
    read = reader.read(line, source=source(tmp_path, data_augment=True), number=1)
    num_frames = len(read.sample.images)
    assert 8 <= num_frames <= 32
    assert read.sample.max_dynamic_patch == 1
    assert read.sample.data_augment
    assert read.encoded.tiles_per_image == (1,) * num_frames
    assert read.suffixes == ("png",) * num_frames
    text = "".join(f"Frame-{i}: <image>\n" for i in range(1, num_frames + 1))
    assert read.sample.turns[0].text == f"{text}What?"
    again = new_reader(tokenizer).read(line, source=source(tmp_path), number=1)
    assert again.sample.images == read.sample.images
    for n in range(2, 6):  # each key draws its own
        other = reader.read(line, source=source(tmp_path), number=n)
        assert other.sample.images != read.sample.images


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (row(video="none"), r"^broken video: .*a.jsonl:2: sample 'set_a-00000002': .*none"),
        (row(video="clip", clip=3), r"^broken video: .*'clip' is 3; expected \[start, end\]"),
        (row(video=["clip"]), r"^broken line: .*'video' is \['clip'\]"),
        (
            row(video="clip", image="a.png"),
            r"^broken line: .*expected the path of one video, or images",
        ),
        (row("<video><video>", video="clip"), r"^wrong conversation: .*2 <video> tags"),
        (row(image="x.png"), r"^missing file: .*image 'x.png' cannot be read"),
        (row(image="\0"), r"^missing file: .*null byte"),
        (row(image="clip"), r"^missing file: .*Is a directory"),
        (row(image="bad.png"), r"^broken image: .*a.jsonl:2: .*cannot be decoded"),
        (
            row("<image><image>", image="a.png"),
            r"^wrong conversation: .*2 <image> tags but 1 images",
        ),
        (row("<image>"), r"^wrong conversation: .*1 <image> tags but 0 images"),
        (row("<image>", image=["a.png"] * 2), r"^wrong conv.*1 <image> tags but 2 images"),
        (row(answer=""), r"^wrong conversation: .*turn 2 is an empty answer"),
        (row(image={"path": "a.png"}), r"^broken line: .*expected a path or a list of paths"),
        (b"{", r"^broken line: .*broken JSON"),
    ],
)
def test_a_broken_sample_is_named_by_cause(tmp_path, reader, line, message):
    frames_of(tmp_path, number=2)
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "bad.png").write_bytes(picture()[:40])
    with pytest.raises(SampleError, match=message):
        reader.read(line, source=source(tmp_path), number=2)


@pytest.mark.parametrize("samples_per_run", [1, 2, 3, 10])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_lines_are_cut_without_loss(tmp_path, samples_per_run, end):
    path = tmp_path / "a.jsonl"
    lines = [b"\xef\xbb\xbf{1}", b"", b"{2}", "{\u00fc}".encode(), b"  ", b"{4}", b"", b"{5}"]
    for last in (b"", end):
        path.write_bytes(end.join(lines) + last)
        plan = cut_lines(path, samples_per_run=samples_per_run)
        read = [
            (number, line.strip()) for run in plan.runs for number, line in read_lines(path, run)
        ]
        numbered = enumerate(lines, start=1)
        assert read == [(number, line) for number, line in numbered if line.strip()]
        assert {run.num_samples for run in plan.runs[:-1]} <= {samples_per_run}
        assert plan.num_samples == 5


def meta(tmp_path, text):
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "meta.json").write_text(text if isinstance(text, str) else json.dumps(text))
    return read_meta(tmp_path / "meta.json")


def test_the_official_meta_is_read(tmp_path):
    annotation = tmp_path / "a.jsonl"
    same = {"data_augment": True, "length": 3, "max_dynamic_patch": 6}
    entry = {"root": str(tmp_path), "annotation": str(annotation), "repeat_time": 0.5, **same}
    full, least = meta(tmp_path, {"b": entry, "a": {"root": "", "annotation": str(annotation)}})
    assert full == Source(name="b", annotation=annotation, root=tmp_path, repeat=0.5, **same)
    assert least == Source(name="a", annotation=annotation, root=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotation": None}, "data set 'n': annotation is None; expected str"),
        ({"annotation": ""}, "data set 'n': no annotation"),
        ({"annotation": "none.jsonl"}, "none.jsonl: no such file"),
        ({"root": "/no/where"}, "/no/where: neither a folder nor a .tar file"),
        ({"anotation": "x"}, "data set 'n': unknown field 'anotation'; did you mean 'annotation'"),
        ({"repeat_time": 0}, "data set 'n': repeat_time is 0"),
        ({"repeat_time": -1.5}, "data set 'n': repeat_time is -1.5"),
        ({"repeat_time": float("nan")}, "data set 'n': repeat_time is nan"),
        ({"repeat_time": "2"}, "data set 'n': repeat_time is '2'; expected int or float"),
        ({"repeat_time": True}, "data set 'n': repeat_time is True"),
        ({"data_augment": 1}, "data set 'n': data_augment is 1; expected bool"),
        ({"length": 1.5}, "data set 'n': length is 1.5; expected int"),
        ({"max_dynamic_patch": 0}, "data set 'n': max_dynamic_patch is 0"),
    ],
)
def test_a_wrong_meta_names_data_set_and_field(tmp_path, change, message):
    entry = {"root": str(tmp_path), "annotation": str(tmp_path / "a.jsonl")}
    with pytest.raises(ConfigError, match=message):
        meta(tmp_path, {"n": entry | change})


def test_a_meta_that_is_none_is_refused(tmp_path):
    entry = {"root": str(tmp_path), "annotation": str(tmp_path / "a.jsonl")}
    for content, message in (
        ("{", "cannot be read"),
        ("[]", "expected {name"),
        ({"n": 3}, "data set 'n': 3; expected an object"),
        ({"n": {}}, "data set 'n': no annotation"),
        ({"a/b": entry}, "data set 'a/b': a folder gets this name"),
        ({"..": entry}, "a folder gets this name"),
        ({"mixture.json": entry}, "a folder gets this name"),
        ({"a.b": entry, "a_b": entry}, "several data sets whose keys start with 'a_b'"),
        (f'{{"n": {json.dumps(entry)}, "n": {json.dumps(entry)}}}', "several entries 'n'"),
    ):
        with pytest.raises(ConfigError, match=message):
            meta(tmp_path, content)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_meta(tmp_path / "none.json")
