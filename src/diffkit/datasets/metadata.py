"""Labels from a table beside the images, joined to the examples by their names, with an account of the join."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from diffkit.datasets.columns import Column, ColumnError, is_unknown, read_column, tells_apart, text, word_of
from diffkit.datasets.imagefile import printable
from diffkit.datasets.join import Join
from diffkit.datasets.matching import AmbiguousNameError, Images, Matches, count_matches, match
from diffkit.datasets.names import key, unescaped
from diffkit.datasets.tablefile import read_sheet
from diffkit.errors import DiffkitError, ExitCode, did_you_mean

NAME_COLUMNS = ("file_name", "filename", "file", "path", "image_path", "image", "image_id", "id", "name")


class Table:
    """A file of labels: attributes (`columns.read_column` says which a column gives) and, from one column, a class."""

    def __init__(self, path: Path, columns: Sequence[str] = (), class_column: str = "", name_column: str = "") -> None:
        """`columns` become attributes; with none given all those that can, but the file name and the class column.

        `name_column` holds the file names; by default it is the column that names the most images. Raises
        DiffkitError for a file that cannot be read and for columns that are not there.
        """
        self.sheet = read_sheet(path)
        self.columns, self.class_column, self.name_column = tuple(columns), class_column, name_column
        for name in filter(None, [*columns, class_column, name_column]):
            if name not in self.sheet.columns:
                raise _error(
                    f"{path} has no column '{name}'.",
                    f"{did_you_mean(name, self.sheet.columns)}Its columns: {', '.join(self.sheet.columns)}.",
                )

    def join(self, identities: Iterable[str], root: str = "") -> Join:
        """Find the row of each image. `root`: the name of the folder that they lie in, with which names may begin.

        Raises DiffkitError where it names none of them, and for anything ambiguous: a row that may name several
        images, rows that contradict each other, columns that may mean two things.
        """
        images = Images(list(identities), root)
        self._check_header(images)
        name_column = self.name_column or self._find_names(images)
        cells = [text(row.get(name_column)) for row in self.sheet.rows]
        matches = self._match(cells, images)
        if not matches.image_of and images.identities:
            raise self._no_match(cells, name_column, images)
        rows = defaultdict[int, list[int]](list)
        for row, image in sorted(matches.image_of.items()):
            rows[image].append(row)
        chosen = [name for name in self.columns or self.sheet.columns if name not in (name_column, self.class_column)]
        repeated = self._repeated(rows, images, chosen)
        first = {image: those[0] for image, those in sorted(rows.items())}
        columns, left_out = self._read(chosen, list(first.values()))
        self._check_attributes(columns)
        return Join(
            sheet=self.sheet,
            name_column=name_column,
            class_column=self.class_column,
            images=images.identities,
            matches=matches,
            row_of=first,
            columns=columns,
            left_out=left_out,
            classes=self._classes(list(first.values())),
            repeated=repeated,
        )

    def _check_attributes(self, columns: Mapping[str, Column]) -> None:
        """Raises DiffkitError where two columns give the same attribute."""
        source: dict[str, str] = {}
        for name, column in columns.items():
            for attribute in {attribute for values in column.values for attribute in values}:
                other = source.setdefault(attribute, name)
                if other != name:
                    raise _error(
                        f"The columns '{printable(other)}' and '{printable(name)}' of {self.sheet.path} both give the "
                        f"attribute '{printable(attribute)}'.",
                        "Rename one of them, or choose columns with --label-columns.",
                    )

    def _check_header(self, images: Images) -> None:
        header = [] if not self.sheet.delimiter else self.sheet.columns
        data = [name for name in header if count_matches([name], images)[0]]
        if data:
            raise _error(
                f"The first line of {self.sheet.path} must name the columns, but '{data[0]}' is an image.",
                "Put a line such as file_name,age in front.",
            )

    def _find_names(self, images: Images) -> str:
        """The column whose cells are the names of the most images. Raises DiffkitError where two may be meant."""
        columns = {name: [text(row.get(name)) for row in self.sheet.rows] for name in self.sheet.columns}
        counts = {name: count_matches(cells, images) for name, cells in columns.items()}
        usual = [name for name in NAME_COLUMNS if name in columns]
        best = max(counts.values())
        first = [name for name in [*usual, *columns] if counts[name] == best]
        if not best[0] and first[0] not in usual and (usual or 2 * best[1] < len(self.sheet.rows)):
            # Ages are easily taken for 1.png to 99.png: only a column of names, or most of one, counts so loosely.
            return max(usual, key=lambda name: counts[name]) if usual else self.sheet.columns[0]
        rival = next((name for name in usual if counts[name][0] and first[0] not in usual), "")
        alike = [name for name in first if (name in usual) == (first[0] in usual)]
        rival = rival or next((n for n in alike if not _name_the_same(columns[n], columns[first[0]], images)), "")
        if rival:
            raise _error(
                f"Two columns of {self.sheet.path} hold names of images: '{rival}' and '{first[0]}'.",
                f"Say which one names the image of its row: --labels-column '{first[0]}'.",
            )
        return first[0]

    def _match(self, cells: Sequence[str], images: Images) -> Matches:
        try:
            return match(cells, images)
        except AmbiguousNameError as error:
            alike = len({key(unescaped(name)) for name in error.images}) == 1
            several = " or ".join(ascii(name) if alike else name for name in error.images[:3])
            raise _error(
                f"{self._where(error.row)}: '{printable(cells[error.row])}' may name {several}.",
                "Write the path of the image relative to the folder, and give no two images the same name.",
            ) from error

    def _no_match(self, cells: Sequence[str], name_column: str, images: Images) -> DiffkitError:
        example = next(filter(None, cells), "")
        return _error(
            f"{self.sheet.path} names none of the images: it has '{printable(example)}' in the column '{name_column}', "
            f"they are like '{images.identities[0]}'.",
            "Its file names must be those of the images, relative to their folder; --labels-column names the column "
            f"that holds them, out of {', '.join(self.sheet.columns)}.",
        )

    def _repeated(self, rows: Mapping[int, list[int]], images: Images, chosen: Sequence[str]) -> list[str]:
        """Images with several rows that say the same. Raises DiffkitError for rows that contradict each other."""
        used = [*chosen, *filter(None, [self.class_column])]
        repeated = []
        for image, those in rows.items():
            first, *others = ([text(self.sheet.rows[row].get(name)) for name in used] for row in those)
            for row, other in zip(those[1:], others, strict=True):
                for name, one, two in zip(used, first, other, strict=True):
                    if one != two:
                        raise _error(
                            f"{self._where(those[0])} and {self.sheet.where(row)} contradict each other about "
                            f"{images.identities[image]}: '{printable(one)}' and '{printable(two)}' in '{name}'.",
                            "Remove one of them; a cell may hold several words, as in red|round.",
                        )
            if others:
                repeated.append(f"{images.identities[image]} ({', '.join(self.sheet.where(row) for row in those)})")
        return repeated

    def _read(self, chosen: Sequence[str], rows: Sequence[int]) -> tuple[dict[str, Column], dict[str, str]]:
        """The columns that give attributes, and those that do not, with the reason."""
        read: dict[str, Column] = {}
        left_out: dict[str, str] = {}
        for name in chosen:
            cells = [self.sheet.rows[row].get(name) for row in rows]
            try:
                if not self.columns and (name in NAME_COLUMNS or name in self.sheet.unnamed):
                    raise ColumnError("it names the images or the rows")
                column = read_column(name, cells, decimal_comma=self.sheet.delimiter == ";")
                if not self.columns and column.kind == "words" and tells_apart(cells):
                    raise ColumnError("it says something else of nearly every image")
                read[name] = column
            except ColumnError as error:
                if self.columns or error.ambiguous:
                    where = self.sheet.path if error.row is None else self._where(rows[error.row])
                    hint = "Mend it, or name the columns to use: --label-columns NAME,..."
                    raise _error(f"{where}, column '{name}': {error.reason}.", hint) from error
                left_out[name] = error.reason
        if not read and not self.class_column:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "it has file names only"
            raise _error(
                f"{self.sheet.path} has no column that can be a label ({reasons}).",
                "--label-columns NAME takes a column as it is; --class-column NAME makes it the class.",
            )
        return read, left_out

    def _classes(self, rows: Sequence[int]) -> list[str | None]:
        if not self.class_column:
            return [None] * len(rows)
        cells = [self.sheet.rows[row].get(self.class_column) for row in rows]
        for row, cell in zip(rows, cells, strict=True):
            if isinstance(cell, (dict, list)):
                raise _error(f"{self._where(row)}, column '{self.class_column}': a class is one word, not {cell}.", "")
        return [None if is_unknown(cell) else word_of(cell) for cell in cells]

    def _where(self, row: int) -> str:
        return f"{self.sheet.path}, {self.sheet.where(row)}"


def _error(message: str, hint: str) -> DiffkitError:
    return DiffkitError(message, hint, code=ExitCode.DATA)


def _name_the_same(cells: Sequence[str], others: Sequence[str], images: Images) -> bool:
    """Whether two columns name the same image in every row."""
    if cells == others:
        return True
    try:
        return match(cells, images).image_of == match(others, images).image_of
    except AmbiguousNameError:
        return False
