"""Each kind of source gives the samples that it holds, and says what is wrong with it and where."""

import io
import json
import shutil
import tarfile

import pytest
from PIL import Image

from megatron_vico.data import records
from megatron_vico.data.encode import image_file
from megatron_vico.data.encode.sample_encoder import SampleEncoder
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.shard_tools.lines import cut_lines, read_lines
from megatron_vico.shard_tools.options import WriterOptions
from megatron_vico.shard_tools.sample_reader import SampleReader, TarMembers
from megatron_vico.shard_tools.sources import Source, read_meta
from megatron_vico.shard_tools.tar import members_of
from tests.unit.conftest import SETTINGS
from tests.unit.shard_tools.broken_samples import BROKEN, frames_of, make_media, picture, row


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def new_reader(tokenizer, **options):
    encoder = SampleEncoder(tokenizer=tokenizer, settings=SETTINGS)
    return SampleReader(encoder=encoder, options=WriterOptions(**options))


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


@pytest.mark.parametrize(("line", "cause", "words"), BROKEN)
def test_a_broken_sample_is_named_by_cause(tmp_path, reader, line, cause, words):
    make_media(tmp_path)
    message = rf"^{cause}: .*a.jsonl:2: sample 'set_a-00000002': .*{words}"
    with pytest.raises(SampleError, match=message):
        reader.read(line, source=source(tmp_path), number=2)


def test_the_sizes_of_a_samples_images_are_added_up(tmp_path, reader, monkeypatch):
    (tmp_path / "a.png").write_bytes(picture())
    line = row("<image>" * 3, image=["a.png"] * 3)
    monkeypatch.setattr(records, "MAX_IMAGE_BYTES", 3 * len(picture()))
    monkeypatch.setattr(image_file, "MAX_SAMPLE_PIXELS", 3 * 32 * 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32)
    assert len(reader.read(line, source=source(tmp_path), number=1).sample.images) == 3
    monkeypatch.setattr(image_file, "MAX_SAMPLE_PIXELS", 3 * 32 * 32 - 1)
    with pytest.raises(SampleError, match=r"^broken image: .*a.jsonl:1: .*3 images of 3072 pixels"):
        reader.read(line, source=source(tmp_path), number=1)
    monkeypatch.setattr(records, "MAX_IMAGE_BYTES", 3 * len(picture()) - 1)
    with pytest.raises(SampleError, match=r"^missing file: .*images of more than \d+ bytes toget"):
        reader.read(line, source=source(tmp_path), number=1)


def test_paths_may_lead_out_where_the_user_says_so(tmp_path, tokenizer):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "root").mkdir()
    reader = new_reader(tokenizer, allow_outside_root=True)
    for name in ("../a.png", str(tmp_path / "a.png")):
        read = reader.read(row(image=name), source=source(tmp_path, tmp_path / "root"), number=1)
        assert read.sample.images == (picture(),)


def test_a_tag_without_an_image_is_text_and_one_image_tag_marks_the_video(tmp_path, reader):
    question = "How is the SVG <image> element used?"
    read = reader.read(row(question), source=source(tmp_path), number=1)
    assert (read.sample.turns[0].text, read.encoded.num_tiles) == (question, 0)
    frames_of(tmp_path)
    line = row("See <image>\nWhat?", video="clip")
    read = reader.read(line, source=source(tmp_path), number=1)
    assert read.sample.turns[0].text.startswith("See Frame-1: <image>\nFrame-2: ")


def test_a_sample_larger_than_a_pack_is_left_out(tmp_path, tokenizer):
    reader = new_reader(tokenizer, seq_length=300, max_tiles_per_pack=2, tokens_kept=256)
    (tmp_path / "a.png").write_bytes(picture())
    reader.read(row(), source=source(tmp_path), number=1)
    for line in (row(image="a.png"), row(image=["a.png"] * 3), row(answer="red " * 300)):
        with pytest.raises(SampleError, match=r"^too large for a pack: .*a.jsonl:1: .* tiles; exp"):
            reader.read(line, source=source(tmp_path), number=1)


def add(tar, name, content=b"", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


def test_links_and_other_names_of_tar_members(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "./", type=tarfile.DIRTYPE)
        add(tar, "in/hard.jpg", type=tarfile.LNKTYPE, linkname="/data/a.jpg")
        add(tar, "in/soft.jpg", type=tarfile.SYMTYPE, linkname="../data/b.jpg")
        add(tar, "data/b.jpg", type=tarfile.SYMTYPE, linkname="a.jpg")
        add(tar, "/data/a.jpg", b"content")
        add(tar, "round.jpg", type=tarfile.SYMTYPE, linkname="./round.jpg")
        add(tar, "pipe.jpg", type=tarfile.FIFOTYPE)
    tars = TarMembers()
    for name in ("in/hard.jpg", "in/soft.jpg", "data/b.jpg", "data/a.jpg", "./data//a.jpg"):
        assert tars.read(tmp_path / "a.tar", name) == b"content"
    for name, what in (("round.jpg", "a link to 'round.jpg'"), ("pipe.jpg", "no plain file")):
        with pytest.raises(OSError, match=f"has no member '{name}': it is {what}"):
            tars.read(tmp_path / "a.tar", name)


def test_tars_that_others_made_are_indexed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "./", type=tarfile.DIRTYPE)
        for key in ("a.b/s0", "./s1"):
            add(tar, f"{key}.jpg", b"image")
            add(tar, f"{key}.json", b"{}")
        add(tar, "s2.json", b"{}")
        add(tar, "s2.0.jpg", type=tarfile.LNKTYPE, linkname="./s1.jpg")
    found = members_of(tmp_path / "a.tar")
    assert list(found) == ["a.b/s0", "s1", "s2"]
    assert found["s2"][1] == found["s1"][1]
    assert [size for _, size in found["a.b/s0"]] == [2, 5]
    for name in ("s3.cls", "s2.png", "s2.00000000000.png", f"s2.{'9' * 5000}.png", "s2.5000.png"):
        with tarfile.open(tmp_path / "a.tar", "a") as tar:
            add(tar, name, b"x")
        shutil.copy(tmp_path / "a.tar", tmp_path / "b.tar")
        with pytest.raises(SampleError, match=r"b.tar: 's\d\..* is no part of a sample; expected"):
            members_of(tmp_path / "b.tar")


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


def test_a_line_without_end_is_one_broken_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 8)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{1}\n" + b"x" * 1000 + b"\n{3}\n")
    plan = cut_lines(path, samples_per_run=2)
    read = [each for run in plan.runs for each in read_lines(path, run)]
    assert read == [(1, b"{1}\n"), (2, b"x" * 9), (3, b"{3}\n")]


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
