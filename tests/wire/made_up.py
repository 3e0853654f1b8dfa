"""Messages of any schema that a machine makes up: well-formed on the wire, and everything else by chance."""

from hypothesis import strategies as st

texts = st.sampled_from(["", "run", "a", "notes", "\n", "ε" * 300]) | st.text(max_size=8)


def values(field):
    """A strategy for one field of a message, by its type."""
    if field.type == field.TYPE_BYTES:
        return st.sampled_from([b"", bytes(4), bytes(16), b"\xff\xff\xff\x7f"]) | st.binary(max_size=20)
    kinds = {
        field.CPPTYPE_STRING: texts,
        field.CPPTYPE_BOOL: st.booleans(),
        field.CPPTYPE_DOUBLE: st.sampled_from([0.0, 1.0, -1.0, 1e-5, 1e308, 5e-324]) | st.floats(),
        field.CPPTYPE_UINT32: st.integers(0, 3) | st.integers(0, 2**32 - 1),
        field.CPPTYPE_UINT64: st.integers(0, 3) | st.integers(0, 2**64 - 1),
        field.CPPTYPE_ENUM: st.integers(-1, 12),
    }
    return messages(field.message_type) if field.message_type else kinds[field.cpp_type]


@st.composite
def messages(draw, descriptor):
    """A message of that type with some of its fields set."""
    message = {}
    for field in descriptor.fields:
        if descriptor.name != "RegisterRequest" and draw(st.integers(0, 3)) == 0:
            continue
        if field.message_type and field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name
            message[field.name] = draw(st.dictionaries(values(entry["key"]), values(entry["value"]), max_size=2))
        elif field.is_repeated:
            message[field.name] = draw(st.lists(values(field), max_size=2))
        else:
            message[field.name] = draw(values(field))
    return message
