//! From a tree to text: as libvirt prints documents (two spaces, single quotes), or compact as libxml2 dumps a node.

use crate::tree::{Element, Node};

/// The document as libvirt prints it, with a newline at the end.
pub fn to_document(root: &Element) -> String {
    let mut out = String::with_capacity(2048);
    write_indented(root, 0, &mut out);
    out
}

/// One element on one line, double quotes, content as it is.
pub fn to_compact(element: &Element) -> String {
    let mut out = String::new();
    write_compact(element, &mut out);
    out
}

fn write_indented(element: &Element, depth: usize, out: &mut String) {
    indent(depth, out);
    out.push('<');
    out.push_str(&element.name);
    for (name, value) in &element.attributes {
        out.push(' ');
        out.push_str(name);
        out.push_str("='");
        escape(value, out);
        out.push('\'');
    }
    if element.children.is_empty() {
        out.push_str("/>\n");
        return;
    }
    out.push('>');
    let mut broken = false;
    for node in &element.children {
        match node {
            Node::Element(child) => {
                if !broken {
                    out.push('\n');
                    broken = true;
                }
                write_indented(child, depth + 1, out);
            }
            Node::Text(text) => escape(text, out),
            Node::Verbatim(raw) => out.push_str(raw),
        }
    }
    if broken {
        indent(depth, out);
    }
    out.push_str("</");
    out.push_str(&element.name);
    out.push_str(">\n");
}

fn indent(depth: usize, out: &mut String) {
    for _ in 0..depth {
        out.push_str("  ");
    }
}

/// The five characters that libvirt escapes, in texts and attributes alike.
fn escape(text: &str, out: &mut String) {
    for character in text.chars() {
        match character {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&apos;"),
            other => out.push(other),
        }
    }
}

fn write_compact(element: &Element, out: &mut String) {
    out.push('<');
    out.push_str(&element.name);
    for (name, value) in &element.attributes {
        out.push(' ');
        out.push_str(name);
        out.push_str("=\"");
        escape_libxml(value, true, out);
        out.push('"');
    }
    if element.children.is_empty() {
        out.push_str("/>");
        return;
    }
    out.push('>');
    for node in &element.children {
        match node {
            Node::Element(child) => write_compact(child, out),
            Node::Text(text) => escape_libxml(text, false, out),
            Node::Verbatim(raw) => out.push_str(raw),
        }
    }
    out.push_str("</");
    out.push_str(&element.name);
    out.push('>');
}

fn escape_libxml(text: &str, attribute: bool, out: &mut String) {
    for character in text.chars() {
        match character {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' if attribute => out.push_str("&quot;"),
            '\n' if attribute => out.push_str("&#10;"),
            other => out.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse::parse_document;

    #[test]
    fn documents_look_like_libvirts() {
        let source = "<a  x=\"1'2\"><b>t&amp;u</b><c><d/></c><metadata>\n  raw &amp; \"kept\"\n</metadata></a>";
        let root = parse_document(source.as_bytes(), "x", &["metadata"]).unwrap();
        let expected = "<a x='1&apos;2'>\n  <b>t&amp;u</b>\n  <c>\n    <d/>\n  </c>\n  \
                        <metadata>\n  raw &amp; \"kept\"\n</metadata>\n</a>\n";
        assert_eq!(to_document(&root), expected);
        assert_eq!(parse_document(expected.as_bytes(), "x", &["metadata"]).unwrap(), root);
    }

    #[test]
    fn a_node_dump_looks_like_libxml2s() {
        let root = parse_document(b"<a x='1\"'><b>&lt;</b></a>", "x", &[]).unwrap();
        assert_eq!(to_compact(&root), "<a x=\"1&quot;\"><b>&lt;</b></a>");
    }
}
