"""What the verbs that bring in data take: `prefixmem start`, `sids` and `data`."""

from __future__ import annotations

import argparse
import os
from typing import Any

from prefixmem_jax.cli import verbs
from prefixmem_jax.cli.arguments import described, local_path, positive
from prefixmem_jax.storage import to_path


def add_convert(subparsers: Any) -> None:
    summary = "Turn raw interactions, and items if there are some, into a dataset folder."
    converting = subparsers.add_parser(
        "convert",
        help=summary,
        **described(
            summary,
            "  prefixmem data convert items.csv interactions.csv --out DIR\n"
            "  prefixmem data convert log.parquet --out DIR source.user=uid source.item=sku\n"
            "  prefixmem data convert ml-32m --out DIR source=movielens k_core=5\n"
            "  prefixmem data convert meta_Beauty.json.gz reviews_Beauty.json.gz --out DIR "
            "source=amazon_reviews\n\n"
            "sources: tables (default), movielens, amazon_reviews, recbole, lc_rec",
        ),
    )
    converting.set_defaults(verb=verbs.convert)
    add_raw(converting)
    converting.add_argument(
        "--out",
        type=to_path,
        required=True,
        metavar="DIR",
        help="an older dataset there is replaced; also gs://BUCKET/DIR or s3://",
    )


def add_generate(subparsers: Any) -> None:
    summary = "Write a synthetic dataset of any size, and the best accuracy that is possible on it."
    generating = subparsers.add_parser(
        "generate",
        help=summary,
        **described(
            summary,
            "  prefixmem data generate --out DIR users=100000 'children=(64,8,8,8,8)'\n"
            "  prefixmem data generate --out DIR personal=0   # deep codes by prefix alone",
        ),
    )
    generating.set_defaults(verb=verbs.generate)
    generating.add_argument(
        "--out", type=to_path, required=True, metavar="DIR", help="an earlier one is replaced"
    )
    generating.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="users, codebook_sizes, children, groups, styles, loyalty, personal, exponent, "
        "mean_length, max_length, titles, seed",
    )


def add_tokenizer(subparsers: Any) -> None:
    summary = "Train a tokenizer on a dataset's titles, for a decoder that starts from scratch."
    training = subparsers.add_parser(
        "tokenizer",
        help=summary,
        **described(summary, "  prefixmem data tokenizer DIR --tokens 4096 --out DIR/tokenizer"),
    )
    training.set_defaults(verb=verbs.tokenizer)
    training.add_argument("data", metavar="DIR", help="dataset folder, with titles")
    training.add_argument(
        "--tokens", type=positive, default=4096, metavar="N", help="at most (default: %(default)s)"
    )
    training.add_argument(
        "--out",
        type=local_path,
        required=True,
        metavar="DIR",
        help="an older tokenizer is replaced",
    )


def add_pack(subparsers: Any, overrides_help: str) -> None:
    summary = "Pack a config's training rows into files, for data that memory should not hold."
    packing = subparsers.add_parser(
        "pack",
        help=summary,
        **described(
            summary,
            "  prefixmem data pack recommend/small data.path=DIR --out DIR/packed --shards 64\n"
            "  prefixmem train recommend/small data.path=DIR data.packed=DIR/packed",
        ),
    )
    packing.set_defaults(verb=verbs.pack)
    packing.add_argument("config", metavar="CONFIG", help="as `prefixmem train` takes it")
    packing.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides_help)
    packing.add_argument(
        "--out",
        type=local_path,
        required=True,
        metavar="DIR",
        help="an earlier packing is replaced",
    )
    packing.add_argument(
        "--shards", type=positive, default=16, metavar="N", help="files (default: %(default)s)"
    )
    packing.add_argument(
        "--workers",
        type=positive,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes that write at a time (default: one for each core)",
    )


def add_inspect(subparsers: Any, overrides_help: str) -> None:
    summary = "Show what training sees: how much there is, and some documents item by item."
    inspecting = subparsers.add_parser(
        "inspect",
        help=summary,
        **described(
            summary,
            "  prefixmem data inspect recommend/small data.path=DIR\n"
            "  prefixmem data inspect runs/b2/config.json --documents 10\n"
            "  prefixmem data inspect runs/b2/config.json --batch 7   # of step 7",
        ),
    )
    inspecting.set_defaults(verb=verbs.inspect)
    inspecting.add_argument("config", metavar="CONFIG", help="as `prefixmem train` takes it")
    inspecting.add_argument(
        "--documents", type=positive, default=3, metavar="N", help="to show (default: %(default)s)"
    )
    inspecting.add_argument(
        "--batch",
        type=positive,
        metavar="STEP",
        help="show those of the batch of this step (default: those of the first rows)",
    )
    inspecting.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides_help)


def add_report(subparsers: Any, overrides_help: str) -> None:
    summary = "Measure the Semantic IDs that a dataset has already, before anything is trained."
    reporting = subparsers.add_parser(
        "report",
        help=summary,
        **described(
            summary,
            "  prefixmem data report DIR\n"
            "  prefixmem data report DIR data.sid_column=sid_image --embeddings FILE --out report",
        ),
    )
    reporting.set_defaults(verb=verbs.report_sids)
    reporting.add_argument("data", metavar="DIR", help="dataset folder")
    add_embeddings(reporting, "for how well prefixes gather neighbours")
    reporting.add_argument(
        "--out", type=local_path, metavar="DIR", help="gets sids.html, sids.json and sids.png"
    )
    reporting.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides_help)


def add_raw(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "given",
        nargs="+",
        metavar="PATH|KEY=VALUE",
        help="ITEMS INTERACTIONS, or INTERACTIONS alone, or the folder of another source; and keys",
    )


def add_embeddings(
    parser: argparse.ArgumentParser, purpose: str = "default: vectors of the titles"
) -> None:
    parser.add_argument(
        "--embeddings",
        type=local_path,
        metavar="FILE",
        help=".parquet or .npz with item_id and embedding, or NAME.npy beside NAME.item_id.npy "
        f"({purpose})",
    )
