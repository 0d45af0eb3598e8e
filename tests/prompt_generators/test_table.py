import pytest

from prompt_generators import ProfileError, generator_length, make_generator


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "t.csv"
        path.write_text(content, encoding="utf-8")
        return path

    return write


def test_rows_are_prompts(write):
    path = write("id,prompt,negative_prompt,seed\n1,a cat,blurry,5\n2,猫 ,,\n")
    generator = make_generator("table", profiles=path)
    assert generator_length(generator) == 2
    first, second = generator.generate_prompt(0), generator.generate_prompt(1)
    assert (first.text, first.negative_text, first.seed) == ("a cat", "blurry", 5)
    assert (second.text, second.negative_text, second.seed) == ("猫", None, None)
    assert first.metadata == {"id": 1, "prompt": "a cat", "negative_prompt": "blurry", "seed": 5}
    for index in (2, -1, True, "0"):
        with pytest.raises(IndexError):
            generator.generate_prompt(index)


def test_columns_by_option(write):
    path = write("text,bad,number,seed\na cat,blurry,5,9\n")
    options = {"column": "text", "negative_column": "bad", "seed_column": "number"}
    prompt = make_generator("table", profiles=path, options=options).generate_prompt(0)
    assert (prompt.text, prompt.negative_text, prompt.seed) == ("a cat", "blurry", 5)


@pytest.mark.parametrize("generator", ["table", "template"])
def test_images_from_one_column_or_several(write, generator):
    path = write("prompt,one,two\nx,a.png,b.png\ny,,c.png\nz,,\n")

    def images(column):
        options = {"image_column": column}
        if generator == "template":
            options["template"] = "{prompt}"
        made = make_generator(generator, profiles=path, options=options)
        return [made.generate_prompt(i).images for i in range(3)]

    assert images(None) == images([]) == [(), (), ()]
    assert images("two") == images(["two"]) == [("b.png",), ("c.png",), ()]
    assert images(["two", "one"]) == [("b.png", "a.png"), ("c.png",), ()]
    with pytest.raises(ProfileError, match="column 'three': no such column, but option image_c"):
        images(["one", "three"])
    with pytest.raises(ValueError, match="must be the name of a column, got 3 \\(a list of names"):
        images(["one", 3])


def test_adapters_by_name(write):
    path = write('prompt,loras\nx,ink\ny,\nz,"ink , pixel"\n')
    generator = make_generator("table", profiles=path)
    loras = [generator.generate_prompt(i).loras for i in range(3)]
    assert loras == [("ink",), (), ("ink", "pixel")]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("text,b\nx,y\n", {}, "column 'prompt': no such column.*allowed: 'text', 'b'"),
        ("prompt\nx\n", {"column": "text"}, "column 'text': no such column.*'prompt'"),
        ("prompt\nx\n", {"negative_column": "n"}, "option negative_column uses it"),
        ("prompt\nx\n", {"seed_column": "s"}, "option seed_column uses it"),
        ("prompt,b\nx,1\n,2\n", {}, "row 3, column 'prompt': the prompt is empty"),
        ("prompt\n3\n4\n", {}, "row 2, column 'prompt': not text but of type int, got 3"),
        ('prompt,loras\nx,"ink,,b"\n', {}, "row 2, column 'loras': a name is empty.*model.loras"),
        ("prompt,loras\nx,7\n", {}, "row 2, column 'loras': not text but of type int, got 7"),
        ("prompt,seed\nx,1\ny,z\n", {}, "row 3, column 'seed': not a whole number.*got 'z'"),
    ],
)
def test_bad_tables(write, content, options, message):
    with pytest.raises(ProfileError, match=message):
        make_generator("table", profiles=write(content), options=options)


def test_needs_a_table(write):
    with pytest.raises(ValueError, match="'table' needs a profile table"):
        make_generator("table")
    with pytest.raises(ValueError, match="option column must be the name of a column, got 3"):
        make_generator("table", profiles=write("prompt\nx\n"), options={"column": 3})
