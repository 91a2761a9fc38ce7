"""The density of a table, from a DataFrame to pictures: wine quality or penguins.

Fits the shipped table, scores rows that were held out, draws new ones, asks conditional questions
by column name, fills gaps, flags odd rows, and saves the model and the pictures.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from pyroflows import DensityEstimator

HERE = Path(__file__).parent
TABLES = {
    "wine": HERE / "data" / "wine_quality.csv.gz",
    "penguins": HERE / "data" / "penguins.csv",
}


def main() -> None:
    """Fit, score, draw, ask, fill in, flag, save and draw pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", choices=TABLES, default="penguins")
    parser.add_argument("--num-steps", type=int, help="optimizer steps, at most")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=HERE / "output", help="folder for the pictures"
    )
    parser.add_argument("--smoke-test", action="store_true", help="a few steps, no pictures")
    args = parser.parse_args()
    steps = 5 if args.smoke_test else args.num_steps

    table = pd.read_csv(TABLES[args.table]).sample(frac=1, random_state=args.seed)
    held, train = table[: len(table) // 5], table[len(table) // 5 :]
    model = DensityEstimator(
        random_state=args.seed, max_steps=steps, device=args.device, progress=not args.smoke_test
    ).fit(train)
    print(model.summary().to_string(float_format="%.3f"))
    print(f"\nheld-out rows: {model.score(held):.3f} nats per row")

    print("\nfive new rows:")
    print(model.sample(5).to_string())

    if args.table == "penguins":
        known, target, question = {"species": "Gentoo", "sex": "FEMALE"}, "body_mass_g", "species"
    else:
        known, target, question = {"color": "red", "alcohol": 12.0}, "volatile_acidity", "color"
    drawn = model.sample(2000, known)[target]
    low, high = np.quantile(drawn, [0.05, 0.95])
    print(f"\n{target} given {known}: mean {drawn.mean():.4g}, 90 % in [{low:.4g}, {high:.4g}]")

    gaps = held.head(5).copy()
    gaps[target] = np.nan
    print("\nfilled in / true:")
    filled = model.impute(gaps, method="mean")[target]
    print(pd.DataFrame({"filled in": filled, "true": held[target].head(5)}).to_string())

    predictor = DensityEstimator(
        target=target,
        given=[c for c in table if c != target],
        random_state=args.seed,
        max_steps=steps,
    ).fit(train)
    complete = held.dropna()
    inside = predictor.interval(complete, 0.9)[target]
    y = complete[target].to_numpy()
    share = ((y >= inside["lower"].to_numpy()) & (y <= inside["upper"].to_numpy())).mean()
    print(
        f"\n90 % intervals of {target} given the other columns hold {share:.0%} of held-out rows"
    )

    odd = held.assign(**{target: held[target] * 3})
    found, alarms = (
        model.predict_outliers(odd, 0.01).mean(),
        model.predict_outliers(held, 0.01).mean(),
    )
    print(
        f"rows with a tripled {target}: {found:.0%} flagged; untouched held-out rows: {alarms:.0%}"
    )

    if args.smoke_test:
        return
    from pyroflows import plots

    args.out.mkdir(parents=True, exist_ok=True)
    model.save(args.out / f"{args.table}.safetensors")
    assert np.allclose(
        DensityEstimator.load(args.out / f"{args.table}.safetensors").score(held),
        model.score(held),
    )
    pictures = {
        "marginals": plots.marginals(model, held),
        "pairs": plots.pair_plot(model, held),
        "pit": plots.pit_plot(model, held).figure,
        "training": plots.training_curve(model).figure,
        "conditional": plots.conditional_density(model, known, target).figure,
        "labels": plots.conditional_density(
            model, {target: float(table[target].median())}, question
        ).figure,
    }
    for name, figure in pictures.items():
        path = args.out / f"{args.table}_{name}.png"
        figure.savefig(path, dpi=120)
        print(path)


if __name__ == "__main__":
    main()
