"""What requests say besides their body: image, condition, form of the answer; and the core that answers."""

import re
from typing import Annotated

from fastapi import Depends, Header, Path, Request

from service.answers import ANY_DIGEST, IfMatch, ImageRef
from service.errors import InvalidImageIdError
from service.rest.masks import png_wanted
from service.rest.tenants import Tenant
from service.segmenter import Segmenter

ENTITY_TAG = re.compile(r'(W/)?"([^"]*)"|([^\s,"]+)')  # or a tag whose quotes were forgotten


async def segmenter_of(request: Request) -> Segmenter:
    """Return the core this app was made for."""
    segmenter: Segmenter = request.app.state.segmenter
    return segmenter


async def image_ref_of(
    tenant: Tenant,
    image_id: Annotated[
        str,
        Path(
            description="Your name for the image: A-Z a-z 0-9 . _ : @ = + -, at most 128, the first a letter or digit.",
            examples=["coins"],
        ),
    ],
    x_image_id: Annotated[
        str | None, Header(description="The same id, for load balancers that hash on a header; optional.")
    ] = None,
) -> ImageRef:
    """Return the image the path names; a header, when there is one, must agree."""
    if x_image_id not in (None, image_id):
        raise InvalidImageIdError("the header x-image-id names another image than the path", field="x-image-id")
    return ImageRef(tenant, image_id)


async def upload_ref_of(
    tenant: Tenant,
    x_image_id: Annotated[str, Header(description="Cache under this id; else under the content digest.")] = "",
) -> ImageRef:
    """Return the name for an image that the path does not name."""
    return ImageRef(tenant, x_image_id)


async def if_match_of(
    if_match: Annotated[
        list[str] | None,
        Header(description="Do it only if the cached image has one of these ETags; `*`: only if there is one."),
    ] = None,
) -> IfMatch:
    """Return the digests in If-Match (RFC 9110, 13.1.1): strong comparison, so that weak tags match nothing."""
    if if_match is None:
        return None
    tags = ENTITY_TAG.findall(", ".join(if_match))
    if any(bare == "*" for _, _, bare in tags):
        return ANY_DIGEST
    return tuple(quoted or bare for weak, quoted, bare in tags if not weak and quoted != "*")


Core = Annotated[Segmenter, Depends(segmenter_of)]
Ref = Annotated[ImageRef, Depends(image_ref_of)]
Condition = Annotated[IfMatch, Depends(if_match_of)]
AsPng = Annotated[bool, Depends(png_wanted)]
