"""The search of `svm fit`, and the score of `svm score`, by scikit-learn and NumPy alone; prints JSON.

    python sklearn_svm.py TRAIN.npy TEST.npy TRAIN.parquet:COLUMN TEST.parquet:COLUMN

Labels follow rows by position here, which holds for features of a whole Parquet file.
"""

import json
import sys
import warnings

import numpy as np
from pyarrow import parquet
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from sklearn.svm import LinearSVC


def main() -> None:
    warnings.simplefilter("ignore")
    sets = []
    for features, labels in zip(sys.argv[1:3], sys.argv[3:5], strict=True):
        file, _, column = labels.rpartition(":")
        sets.append((np.load(features).astype(np.float64), parquet.read_table(file)[column].to_numpy()))
    (x, y), (x_test, y_test) = sets
    x_fit, x_held, y_fit, y_held = train_test_split(x, y, test_size=0.1, stratify=y, random_state=0)
    best = (-1.0, "", 0.0)
    scalers = {"none": lambda: None, "l2": Normalizer, "standard": StandardScaler}
    for scaling, scaler in scalers.items():
        for c in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
            score = make_pipeline(scaler(), LinearSVC(C=c, dual=False)).fit(x_fit, y_fit).score(x_held, y_held)
            if score > best[0]:
                best = (score, scaling, c)
    _, scaling, c = best
    accuracy = make_pipeline(scalers[scaling](), LinearSVC(C=c, dual=False)).fit(x, y).score(x_test, y_test)
    print(json.dumps({"C": c, "scaling": scaling, "accuracy": float(accuracy)}))


if __name__ == "__main__":
    main()
