//! From bytes to a tree. quick-xml finds the tokens; what is refused, and where, is decided here.

use quick_xml::Reader;
use quick_xml::XmlVersion;
use quick_xml::errors::{Error, IllFormedError};
use quick_xml::events::{BytesStart, Event};

use crate::tree::{Element, Node};

/// Largest document, in bytes.
pub const DOCUMENT_BYTES_MAX: usize = 10_000_000;
/// Deepest nesting of elements.
const DEPTH_MAX: usize = 64;
/// Most elements and texts in a document: bounds the memory of the tree.
const NODES_MAX: usize = 100_000;

/// Where and why a document is not well formed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("({label}):{line}: {detail}\n{context}\n{caret}")]
pub struct SyntaxError {
    /// What the document is, as libvirt calls it (`domain_definition`).
    pub label: &'static str,
    /// Line, from 1.
    pub line: usize,
    /// Column in bytes, from 1.
    pub column: usize,
    /// What is wrong.
    pub detail: String,
    /// The line's text, shortened.
    pub context: String,
    /// Spaces up to the column, then `^`.
    pub caret: String,
}

/// Most bytes of a line that an error quotes.
const CONTEXT_MAX: usize = 80;

/// Reads a document. `verbatim` names children of the root whose content is kept as source text.
pub fn parse_document(bytes: &[u8], label: &'static str, verbatim: &[&str]) -> Result<Element, SyntaxError> {
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let valid = std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default();
            let detail = "Input is not proper UTF-8, indicate encoding !".into();
            return Err(syntax_error(valid, label, valid.len(), detail));
        }
    };
    let fail = |offset: usize, detail: String| syntax_error(text, label, offset, detail);
    if text.len() > DOCUMENT_BYTES_MAX {
        return Err(fail(0, format!("document of {} bytes is over the limit of {DOCUMENT_BYTES_MAX}", text.len())));
    }
    if !text.trim_start().starts_with('<') {
        let offset = text.len() - text.trim_start().len();
        return Err(fail(offset, "Start tag expected, '<' not found".into()));
    }
    let mut builder = Builder { stack: Vec::new(), root: None, nodes: 0, raw_from: None, verbatim };
    let mut reader = Reader::from_str(text);
    reader.config_mut().check_end_names = true;
    loop {
        let start = position(&reader);
        let event = reader.read_event().map_err(|error| {
            let offset = usize::try_from(reader.error_position()).unwrap_or(text.len());
            token_error(&error, &builder, text).map_or_else(|| fail(offset, error.to_string()), |(at, d)| fail(at, d))
        })?;
        let end = position(&reader);
        if matches!(event, Event::Eof) {
            return builder.finish(text).map_err(|detail| fail(text.len(), detail));
        }
        builder.take(event, text, start, end).map_err(|detail| fail(start, detail))?;
    }
}

fn position(reader: &Reader<&[u8]>) -> usize {
    usize::try_from(reader.buffer_position()).unwrap_or(usize::MAX)
}

/// Wordings of libxml2 for the commonest slips.
fn token_error(error: &Error, builder: &Builder<'_>, text: &str) -> Option<(usize, String)> {
    let (open, line) = builder.innermost(text)?;
    match error {
        Error::IllFormed(IllFormedError::MismatchedEndTag { found, .. }) => {
            let at = text.find(&format!("</{found}")).unwrap_or(text.len());
            Some((at, format!("Opening and ending tag mismatch: {open} line {line} and {found}")))
        }
        Error::IllFormed(IllFormedError::MissingEndTag(_)) => {
            Some((text.len(), format!("Premature end of data in tag {open} line {line}")))
        }
        _ => None,
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes().iter().take(offset).filter(|&&byte| byte == b'\n').count() + 1
}

fn syntax_error(text: &str, label: &'static str, offset: usize, detail: String) -> SyntaxError {
    let offset = offset.min(text.len());
    let bytes = text.as_bytes();
    let start = bytes[..offset].iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    let end = bytes[offset..].iter().position(|&byte| byte == b'\n').map_or(bytes.len(), |at| offset + at);
    let from = start.max(offset.saturating_sub(CONTEXT_MAX));
    let to = end.min(from + CONTEXT_MAX);
    let line = String::from_utf8_lossy(&bytes[from..to.max(from)]).into_owned();
    // At the end of the input there is no line to show; libvirt prints this word.
    let context = if line.is_empty() && offset == text.len() { "(null)".into() } else { line };
    SyntaxError {
        label,
        line: line_of(text, offset),
        column: offset - start + 1,
        detail,
        context,
        caret: format!("{}^", "-".repeat(offset - from)),
    }
}

struct Open {
    element: Element,
    start: usize,
}

struct Builder<'a> {
    stack: Vec<Open>,
    root: Option<Element>,
    nodes: usize,
    raw_from: Option<usize>,
    verbatim: &'a [&'a str],
}

impl Builder<'_> {
    /// Name and line of the innermost open element.
    fn innermost(&self, text: &str) -> Option<(String, usize)> {
        let open = self.stack.last()?;
        Some((open.element.name.clone(), line_of(text, open.start)))
    }

    fn take(&mut self, event: Event<'_>, text: &str, start: usize, end: usize) -> Result<(), String> {
        match event {
            Event::Start(tag) => {
                self.open(&tag, start)?;
                if self.stack.len() == 2 && self.in_verbatim() {
                    self.raw_from = Some(end);
                }
                Ok(())
            }
            Event::Empty(tag) => {
                self.open(&tag, start)?;
                self.close()
            }
            Event::End(_) => {
                if self.stack.len() == 2
                    && let Some(from) = self.raw_from.take()
                    && let Some(open) = self.stack.last_mut()
                {
                    let raw = text.get(from..start).unwrap_or_default().to_owned();
                    open.element.children = vec![Node::Verbatim(raw)];
                }
                self.close()
            }
            Event::Text(part) => self.text(&part.xml10_content()),
            Event::CData(part) => self.text(&part.xml10_content()),
            Event::GeneralRef(reference) => {
                let name = reference.xml10_content();
                let resolved = match reference.resolve_char_ref() {
                    Ok(Some('\0')) => return Err("xmlParseCharRef: invalid value 0".into()),
                    Ok(Some(character)) => character.to_string(),
                    Ok(None) => quick_xml::escape::resolve_predefined_entity(&name)
                        .ok_or_else(|| format!("Entity '{name}' not defined"))?
                        .to_owned(),
                    Err(error) => return Err(error.to_string()),
                };
                self.text(&resolved)
            }
            Event::DocType(_) => Err("document types and entities are not accepted".into()),
            Event::Comment(_) | Event::Decl(_) | Event::PI(_) | Event::Eof => Ok(()),
        }
    }

    fn in_verbatim(&self) -> bool {
        self.stack.last().is_some_and(|open| self.verbatim.contains(&open.element.name.as_str()))
    }

    fn count(&mut self) -> Result<(), String> {
        self.nodes += 1;
        if self.nodes > NODES_MAX { Err(format!("more than {NODES_MAX} elements and texts")) } else { Ok(()) }
    }

    fn open(&mut self, tag: &BytesStart<'_>, start: usize) -> Result<(), String> {
        self.count()?;
        if self.stack.is_empty() && self.root.is_some() {
            return Err("Extra content at the end of the document".into());
        }
        if self.stack.len() >= DEPTH_MAX {
            return Err(format!("elements are nested more than {DEPTH_MAX} deep"));
        }
        let mut element = Element::new(&check_name(tag.name().0)?);
        for attribute in tag.attributes() {
            let attribute = attribute.map_err(|error| error.to_string())?;
            self.count()?;
            let value = attribute.normalized_value(XmlVersion::Implicit1_0).map_err(|error| error.to_string())?;
            if value.contains('\0') {
                return Err("xmlParseCharRef: invalid value 0".into());
            }
            element.attributes.push((check_name(attribute.key.0)?, value.into_owned()));
        }
        self.stack.push(Open { element, start });
        Ok(())
    }

    fn close(&mut self) -> Result<(), String> {
        let Some(Open { mut element, .. }) = self.stack.pop() else {
            return Err("an end tag without its start".into());
        };
        if element.elements().next().is_some() {
            // Indentation is the writer's business.
            element.children.retain(|node| !matches!(node, Node::Text(text) if text.trim().is_empty()));
        }
        match self.stack.last_mut() {
            Some(parent) => parent.element.push(element),
            None => self.root = Some(element),
        }
        Ok(())
    }

    fn text(&mut self, text: &str) -> Result<(), String> {
        let Some(open) = self.stack.last_mut() else {
            let ok = text.trim().is_empty();
            return if ok { Ok(()) } else { Err("Extra content at the end of the document".into()) };
        };
        if let Some(bad) = text.chars().find(|&c| c < ' ' && !matches!(c, '\t' | '\n' | '\r')) {
            return Err(format!("PCDATA invalid Char value {}", bad as u32));
        }
        if let Some(Node::Text(last)) = open.element.children.last_mut() {
            last.push_str(text);
            return Ok(());
        }
        open.element.children.push(Node::Text(text.to_owned()));
        self.count()
    }

    fn finish(mut self, text: &str) -> Result<Element, String> {
        if let Some((name, line)) = self.innermost(text) {
            return Err(format!("Premature end of data in tag {name} line {line}"));
        }
        self.root.take().ok_or_else(|| "Start tag expected, '<' not found".into())
    }
}

/// A name in the sense of XML, narrowed to what can be written back safely.
fn check_name(name: &str) -> Result<String, String> {
    let first = name.chars().next();
    let starts = first.is_some_and(|c| c.is_alphabetic() || c == '_' || c == ':');
    let rest = name.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | ':' | '-' | '.'));
    if starts && rest { Ok(name.to_owned()) } else { Err(format!("xmlParseStartTag: invalid element name '{name}'")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fails(document: &str) -> String {
        parse_document(document.as_bytes(), "domain_definition", &[]).unwrap_err().to_string()
    }

    #[test]
    fn slips_are_reported_in_the_words_of_libxml2() {
        for (document, expected) in [
            // These three as a stock libvirtd words them.
            (
                "<domain type='qemu'>\n  <name>bad</name>\n  <memory>131072</memory>\n",
                "(domain_definition):4: Premature end of data in tag domain line 1\n(null)\n^",
            ),
            ("this is not XML\n", "(domain_definition):1: Start tag expected, '<' not found\nthis is not XML\n^"),
            ("\n", "(domain_definition):2: Start tag expected, '<' not found\n(null)\n^"),
            ("<a>\n<b>\n</a>", "(domain_definition):3: Opening and ending tag mismatch: b line 2 and a\n</a>\n^"),
            ("<a>&x;</a>", "(domain_definition):1: Entity 'x' not defined\n<a>&x;</a>\n---^"),
            (
                "<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><a>&x;</a>",
                "(domain_definition):1: document types and entities are not accepted\n\
                 <!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><a>&x;</a>\n^",
            ),
            ("<a/><b/>", "(domain_definition):1: Extra content at the end of the document\n<a/><b/>\n----^"),
        ] {
            assert_eq!(fails(document), expected);
        }
    }

    #[test]
    fn size_depth_and_count_are_bounded() {
        assert!(fails(&"<a>".repeat(100_000)).contains("nested more than 64 deep"));
        assert!(fails(&format!("<a>{}</a>", "<b/>".repeat(200_000))).contains("more than 100000 elements"));
        assert!(fails(&format!("<a>{}</a>", "x".repeat(DOCUMENT_BYTES_MAX))).contains("over the limit"));
        assert!(parse_document(b"<a>\xff</a>", "x", &[]).unwrap_err().detail.contains("UTF-8"));
        assert!(fails("<a x='1' x='2'/>").contains("(domain_definition):1: "));
        assert!(fails("<a>\u{1}</a>").contains("PCDATA invalid Char value 1"));
    }

    #[test]
    fn text_references_and_verbatim_content() {
        let source = "<?xml version='1.0'?>\n<d>\n <!-- c --><n a='&lt;&#65;'>x &amp; <![CDATA[<y>]]></n>\n \
                      <metadata>\n <k:v xmlns:k=\"u\">1 &lt; 2</k:v> <!-- kept -->\n</metadata>\n</d>";
        let root = parse_document(source.as_bytes(), "x", &["metadata"]).unwrap();
        let n = root.get("n").unwrap();
        assert_eq!((n.attribute("a"), n.text().as_str()), (Some("<A"), "x & <y>"));
        let raw = "\n <k:v xmlns:k=\"u\">1 &lt; 2</k:v> <!-- kept -->\n";
        assert_eq!(root.get("metadata").unwrap().children, [Node::Verbatim(raw.into())]);
    }

    #[test]
    fn mutated_documents_never_panic() {
        let source =
            "<domain type='qemu'><name>a&amp;b</name><metadata><x:y xmlns:x='z'/></metadata><a b=\"c\"/></domain>";
        let mut seed = 7u64;
        for _ in 0..20_000 {
            let mut bytes = source.as_bytes().to_vec();
            for _ in 0..3 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let at = (seed >> 33) as usize % bytes.len().max(1);
                match seed >> 20 & 3 {
                    _ if bytes.is_empty() => {}
                    0 => bytes[at] = (seed >> 24) as u8,
                    1 => bytes[at] = b"<>&'\"/!?["[(seed >> 24) as usize % 9],
                    2 => drop(bytes.remove(at)),
                    _ => bytes.truncate(at.max(1)),
                }
            }
            let _ = parse_document(&bytes, "domain_definition", &["metadata"]);
        }
    }
}
