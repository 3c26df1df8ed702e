"""Messages that are written by hand are those that protobuf would write."""

from hypothesis import given
from hypothesis import strategies as st
from loom.modelstore.v1 import modelstore_pb2 as pb

from services.modelstore.wire import BlobPiece


@given(st.binary(min_size=1, max_size=300) | st.integers(1, 3_000_000).map(bytes))
def test_a_piece_of_a_blob_is_the_message_that_it_stands_for(data):
    assert BlobPiece(data).SerializeToString() == pb.FetchBlobResponse(data=data).SerializeToString()
