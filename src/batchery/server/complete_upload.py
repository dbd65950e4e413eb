"""`POST /uploads/{id}/complete`: the parts, in the order that is named, become a file.

They pass through the same intake as a file that comes whole. Until the one transaction in which the file gets its row,
the upload ends and its parts are dropped, nothing has happened: whatever goes wrong before, also a crash, the upload
is pending and can be completed again.
"""

from __future__ import annotations

import asyncio
import hashlib

from litestar import post
from litestar.params import FromPath

from batchery.server import body, limits
from batchery.server.context import AnyRequest, Caller, Context, caller_of, context_of
from batchery.server.intake import Intake
from batchery.server.places import Uploads
from batchery.server.render import upload_object
from batchery.server.upload import columns_of, kept_in_doubt
from batchery.server.uploads import check_pending, file_of, owned_upload
from batchery.store import files, uploads
from batchery.store.errors import StoreError
from batchery.store.ids import new_id
from batchery.store.uploads import PartRow, UploadRow
from batchery.wire import ids
from batchery.wire.errors import BadRequest
from batchery.wire.uploads import CompleteUpload, UploadObject, no_such_part, parse_complete_upload

MAX_BODY = 1024 * 1024


@post("/uploads/{id:str}/complete", status_code=200)
async def complete_upload(request: AnyRequest, id: FromPath[str]) -> UploadObject:
    """Make a file of an upload's parts.

    On an upload that is completed it changes nothing and answers as the first time.
    """
    context, caller = context_of(request), caller_of(request)
    wanted = parse_complete_upload(await body.read_whole(request, MAX_BODY))
    now = context.now()
    async with context.database.read() as connection:
        upload = await owned_upload(connection, id, caller.owner)
        parts = await uploads.parts(connection, upload.id)
    if upload.status != "completed":
        check_pending(upload, now)
        chosen = _in_order(upload, parts, wanted)
        places: Uploads = request.app.state.uploads
        places.take()
        try:
            await _complete(context, caller, upload, chosen, wanted.md5)
        except StoreError:
            # Perhaps somebody else has completed or cancelled it, and its parts are gone.
            async with context.database.read() as connection:
                meanwhile = await owned_upload(connection, id, caller.owner)
            if meanwhile.status == "pending":
                raise
        finally:
            places.give_back()
    async with context.database.read() as connection:
        upload = await owned_upload(connection, id, caller.owner)
        if upload.status != "completed":
            check_pending(upload, now)
        return upload_object(upload, await file_of(connection, upload, now), now)


def _in_order(upload: UploadRow, parts: list[PartRow], wanted: CompleteUpload) -> list[PartRow]:
    """The parts that make the file.

    Raises:
        BadRequest: one of them is not there, or they do not add up to what was announced.
    """
    there = {part.id: part for part in parts}
    for place, id in enumerate(wanted.part_ids):
        if id not in there:
            raise no_such_part(ids.show("part", id), place)
    chosen = [there[id] for id in wanted.part_ids]
    size = sum(part.bytes for part in chosen)
    if size != upload.bytes:
        raise BadRequest(
            f"The upload was created for {upload.bytes} bytes, but the {len(chosen)} parts in part_ids have {size}. "
            "It stays pending: add what is missing, or name the right parts. GET /uploads/{id} lists those that are "
            "there, with their sizes.",
            param="part_ids",
            code="size_mismatch",
        )
    return chosen


async def _complete(context: Context, caller: Caller, upload: UploadRow, parts: list[PartRow], md5: str | None) -> None:
    """Make the file, unless somebody else has ended the upload meanwhile."""
    id = new_id()
    async with Intake(context.blobs, id, context.limits) as intake:
        digest = hashlib.md5(usedforsecurity=False)
        for part in parts:
            async for piece in context.blobs.stream(part.blob_key, 0, part.bytes):
                if md5 is not None:
                    await asyncio.to_thread(digest.update, piece)
                await intake.add(piece)
        if md5 is not None and digest.hexdigest() != md5:
            raise BadRequest(
                f"The file should have the MD5 {md5}, but the parts in this order, {upload.bytes} bytes, have "
                f"{digest.hexdigest()}. The upload stays pending: name the parts in the right order, or send the "
                "wrong one again. GET /uploads/{id} lists them with their MD5s.",
                param="md5",
                code="checksum_mismatch",
            )
        taken = await intake.finish()
        columns = columns_of(id, caller, upload.filename, taken, context.now(), upload.file_expires_after)
        doubt = kept_in_doubt(context, intake.keep, lambda connection: files.get(connection, id))
        async with doubt, context.database.write() as connection:
            row = await uploads.get(connection, upload.id, lock=True)
            if row is None or row.status != "pending":
                return
            await uploads.end(connection, upload.id, "completed", context.clock(), file=id)
            await limits.check_new_upload(connection, caller, taken.size)  # for which the parts count no more
            await files.insert(connection, **columns)
        intake.keep()
