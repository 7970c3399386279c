"""Take the announcement of a gain map out of XMP, when the gain map itself is not passed on.

An "Ultra HDR" JPEG holds a second picture that says by how much to brighten the first one, and announces it in its XMP
(hdrgm attributes, and a container directory that lists the second picture). A viewer that finds the announcement
without the map shows the picture wrongly or not at all (Google, Ultra HDR image format 1.1; ISO 21496-1).
"""

import io
from xml.etree import ElementTree as Tree

_GAIN_MAP = "http://ns.adobe.com/hdr-gain-map/1.0/"
_CONTAINER = "http://ns.google.com/photos/1.0/container/"
_ITEM = "http://ns.google.com/photos/1.0/container/item/"
_MAX_BYTES = 4 << 20


def announces_gain_map(xmp: bytes) -> bool:
    """Return True if XMP says that a gain map comes with the picture."""
    return _GAIN_MAP.encode() in xmp


def without_gain_map(xmp: bytes) -> bytes | None:
    """Return XMP without the announcement; None where it cannot be parsed, or nothing else is in it."""
    if len(xmp) > _MAX_BYTES or b"<!DOCTYPE" in xmp or b"<!ENTITY" in xmp:  # an entity could expand without bound
        return None
    try:
        for _, (prefix, uri) in Tree.iterparse(io.BytesIO(xmp), events=["start-ns"]):
            if not prefix.startswith("ns"):  # ElementTree keeps these names to itself
                Tree.register_namespace(prefix, uri)
        root = Tree.fromstring(xmp)
    except (Tree.ParseError, ValueError):
        return None
    for parent in list(root.iter()):
        for name in [name for name in parent.attrib if name.startswith(f"{{{_GAIN_MAP}}}")]:
            del parent.attrib[name]
        for child in list(parent):
            lists_the_map = child.tag == f"{{{_CONTAINER}}}Directory" and _mentions(child, "GainMap")
            if child.tag.startswith(f"{{{_GAIN_MAP}}}") or lists_the_map:
                parent.remove(child)
    body = Tree.tostring(root)
    return b'<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>' + body + b'<?xpacket end="w"?>'


def _mentions(element: Tree.Element, semantic: str) -> bool:
    name = f"{{{_ITEM}}}Semantic"
    return any(part.get(name) == semantic or (part.tag == name and part.text == semantic) for part in element.iter())
