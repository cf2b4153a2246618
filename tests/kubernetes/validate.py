"""Validates Kubernetes manifests against the schemas of some versions; an unknown field is an error. Prints them as JSON.

usage: validate.py FOLDER VERSION...
"""

import json
import pathlib
import sys

import kubernetes_validate
import yaml


class Loader(yaml.SafeLoader):
    """Refuses a mapping with the same key twice, as kubectl does."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if len(keys) != len(set(keys)):
            raise yaml.constructor.ConstructorError(None, None, f"a key twice among {keys}", node.start_mark)
        return super().construct_mapping(node, deep)


def main(folder, versions):
    documents = []
    for path in sorted(pathlib.Path(folder).glob("*.yaml")):
        for document in yaml.load_all(path.read_text(), Loader):
            for version in versions:
                try:
                    kubernetes_validate.validate(document, version, strict=True)
                except kubernetes_validate.ValidationError as error:
                    place = ".".join(str(part) for part in error.path)
                    sys.exit(f"{path.name}: {place}: {error.message} (Kubernetes {version})")
            documents.append(document)
    json.dump(documents, sys.stdout)


main(sys.argv[1], sys.argv[2:])
