"""`python -m bench.article DIR [--set NAME=VALUE ...]`: writes the article's figures and its numbers beside ours."""

import argparse
import sys
from pathlib import Path

from bench.article.book import PAGE, write_figures
from orchestrator.cli.cluster_file import UnusableInput
from orchestrator.cli.overrides import parse_overrides
from orchestrator.profiles.catalog import Catalog, CatalogError


def main() -> int:
    """Write the page; return the exit code: 0, or 2 with one line that says what cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m bench.article", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where index.html and figures.json are written")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="a number of the profiles")
    options = parser.parse_args()
    try:
        write_figures(options.folder, parse_overrides(options.set, Catalog.load().names, None).numbers)
    except (UnusableInput, CatalogError) as error:
        print(f"bench.article: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"bench.article: {options.folder}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"bench.article: wrote {options.folder / PAGE}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
