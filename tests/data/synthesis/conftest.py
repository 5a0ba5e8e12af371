"""The server of the OpenAI protocol of the experts' tests, with the bakery behind it."""

import pytest

from orchestra_jax.experts.endpoint import EndpointExpert
from tests.data.synthesis.bakery import Bakery
from tests.experts.conftest import completion, endpoint  # noqa: F401


@pytest.fixture
def bakery(endpoint, completion):  # noqa: F811
    """The server, answering as a `Bakery`; `server.bakery` can be replaced."""

    def respond(body):
        system, user = (message["content"] for message in body["messages"])
        return completion(endpoint.bakery.respond(system, user))

    endpoint.bakery = Bakery()
    endpoint.respond = respond
    return endpoint


@pytest.fixture
def make_expert(endpoint):  # noqa: F811
    """Endpoint experts of $1 and $2 a million tokens: a reply of 70 and 11 tokens is $92 a million."""

    def made(model):
        return EndpointExpert(
            endpoint.url,
            model,
            max_retries=0,
            timeout_s=300.0,
            input_usd_per_million_tokens=1.0,
            output_usd_per_million_tokens=2.0,
        )

    return made
