"""The gateway around a model that costs nothing is the real one: it takes images and answers prompts."""

import pytest

from benchmarks.photographs import photograph
from benchmarks.services import instant_service
from tests import plain_http


@pytest.mark.parametrize("workers", [1, 2])
def test_the_gateway_around_the_free_model_answers(workers: int) -> None:
    with instant_service(workers) as service:
        url = f"http://{service.addresses['HTTP']}/v1/images/free"
        plain_http.put(url, content=photograph(0)).raise_for_status()
        answer = plain_http.post(f"{url}/masks", json={"prompts": [{"points": [[100, 100, 1]]}]}).raise_for_status()
        (result,) = answer.json()["results"]
        assert result["masks"][0]["area"] > 0
