"""What a request for an endpoint is refused for before anything of it is made."""

import pytest

from datapath.agent.requests import EndpointRequest
from services.runtime.errors import Invalid


def wanted(**changes):
    given = {"namespace": "shop", "name": "web", "netns": "web", "labels": ("k8s:app=web",)}
    return EndpointRequest(**(given | changes)).wanted()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"namespace": ""}, "namespace ''"),
        ({"namespace": "sh op"}, "could not be named by a policy"),
        ({"namespace": "Shop"}, "could not be named by a policy"),
        ({"name": "a/b"}, "name 'a/b'"),
        ({"netns": ""}, "netns ''"),
        ({"netns": "../../etc"}, "netns '../../etc'"),
        ({"interface": ""}, "interface ''"),
        ({"interface": "a/b"}, "interface 'a/b'"),
        ({"interface": ".."}, "interface '..'"),
        ({"interface": "sixteen-letters-"}, "interface 'sixteen-letters-'"),
        ({"labels": ("app=web",)}, "is not source:key=value"),
        ({"labels": ("reserved:host",)}, "nobody is given"),
        ({"labels": ("k8s:=web",)}, "is not source:key=value"),
        ({"labels": ("k8s:a b=c",)}, "could not be selected"),
        ({"labels": ("k8s:app=a b",)}, "could not be selected"),
        ({"labels": (f"k8s:app={'x' * 64}",)}, "could not be selected"),
        ({"labels": ("k8s:io.kubernetes.pod.namespace=bank",)}, "names another namespace"),
    ],
)
def test_a_request_nobody_could_fulfil_names_what_is_wrong(changes, words):
    with pytest.raises(Invalid) as refused:
        wanted(**changes)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_labels_of_other_sources_are_not_bound_to_kubernetes_syntax():
    assert wanted(labels=("container:image=nginx: latest",)).labels


def test_the_namespaces_own_label_may_be_given():
    assert wanted(labels=("k8s:io.kubernetes.pod.namespace=shop",)).labels
