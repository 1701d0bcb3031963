"""What a linear model makes of labelled reviews: character 1-4-gram TF-IDF and a linear SVM, five stratified 80/20 splits.

python bench/linear.py data/ChnSentiCorp_htl_all.csv [--splits FILE] [--compare METRICS.json…]

--splits writes the test sets for sentimentalTrain.py (split_path=FILE); --compare gives the paired difference of
classifiers trained on them. Needs scikit-learn, which nothing else here does.
"""

import argparse
import json

import common  # noqa: F401  first: it makes the folder above importable
import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split
from sklearn.svm import LinearSVC

import reviews
import settings as settings_module


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--splits", metavar="FILE")
    parser.add_argument("--compare", metavar="METRICS.json", nargs="+", default=[])
    options = parser.parse_args()
    texts, labels, _, _ = reviews.read_reviews(options.path)
    texts, sets, accuracy = np.array(texts, dtype=object), [], []
    for seed in range(5):
        training, test = train_test_split(np.arange(len(texts)), test_size=0.2, random_state=seed, stratify=labels)
        vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), min_df=2, sublinear_tf=True)
        machine = LinearSVC().fit(vectorizer.fit_transform(texts[training]), labels[training])
        said = machine.predict(vectorizer.transform(texts[test]))
        accuracy.append(float((said == labels[test]).mean()))
        sets.append([int(i) for i in test])
        print(f"split {seed}: accuracy {accuracy[-1]:.2%}, macro F1 {f1_score(labels[test], said, average='macro'):.4f}", flush=True)
    print(f"mean {np.mean(accuracy):.2%}, deviation {np.std(accuracy, ddof=1):.2%}")
    if options.splits:
        with open(options.splits, "w", encoding="utf-8") as file:
            json.dump(sets, file)
    for path in options.compare:
        with open(path, encoding="utf-8") as file:
            theirs = [run["test"]["accuracy"] for run in json.load(file)["runs"]]
        difference = np.array(theirs) - accuracy
        print(f"{path}: mean {np.mean(theirs):.2%}, deviation {np.std(theirs, ddof=1):.2%}, "
              f"difference {difference.mean():+.2%}, standard error {difference.std(ddof=1) / len(difference) ** 0.5:.2%}")


if __name__ == "__main__":
    settings_module.main(main)
