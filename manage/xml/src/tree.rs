//! The tree a document becomes.

/// An element.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Element {
    /// Name as written, prefix included.
    pub name: String,
    /// Attributes in order, values unescaped.
    pub attributes: Vec<(String, String)>,
    /// Content in order. White space between elements is not kept.
    pub children: Vec<Node>,
}

/// Content of an element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// A child.
    Element(Element),
    /// Text, unescaped.
    Text(String),
    /// Source text that is written back byte for byte (the content of `<metadata>`).
    Verbatim(String),
}

impl Element {
    /// An element without anything.
    pub fn new(name: &str) -> Element {
        Element { name: name.into(), ..Element::default() }
    }

    /// Adds an attribute.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Element {
        self.attributes.push((name.into(), value.into()));
        self
    }

    /// Adds text.
    #[must_use]
    pub fn text_node(mut self, text: impl Into<String>) -> Element {
        self.children.push(Node::Text(text.into()));
        self
    }

    /// Adds a child.
    #[must_use]
    pub fn child(mut self, child: Element) -> Element {
        self.push(child);
        self
    }

    /// Appends a child.
    pub fn push(&mut self, child: Element) {
        self.children.push(Node::Element(child));
    }

    /// Value of an attribute.
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Sets an attribute, in its place where it exists, else last.
    pub fn set_attribute(&mut self, name: &str, value: impl Into<String>) {
        match self.attributes.iter_mut().find(|(key, _)| key == name) {
            Some((_, old)) => *old = value.into(),
            None => self.attributes.push((name.into(), value.into())),
        }
    }

    /// Removes an attribute.
    pub fn remove_attribute(&mut self, name: &str) {
        self.attributes.retain(|(key, _)| key != name);
    }

    /// Child elements in order.
    pub fn elements(&self) -> impl Iterator<Item = &Element> {
        self.children.iter().filter_map(|node| match node {
            Node::Element(element) => Some(element),
            Node::Text(_) | Node::Verbatim(_) => None,
        })
    }

    /// Child elements in order, to change.
    pub fn elements_mut(&mut self) -> impl Iterator<Item = &mut Element> {
        self.children.iter_mut().filter_map(|node| match node {
            Node::Element(element) => Some(element),
            Node::Text(_) | Node::Verbatim(_) => None,
        })
    }

    /// Child elements of one name.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Element> {
        self.elements().filter(move |element| element.name == name)
    }

    /// First child element of a name.
    pub fn get(&self, name: &str) -> Option<&Element> {
        self.elements().find(|element| element.name == name)
    }

    /// First child element of a name, to change.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut Element> {
        self.elements_mut().find(|element| element.name == name)
    }

    /// First child element of a name, made (last) where there is none.
    pub fn get_or_add(&mut self, name: &str) -> &mut Element {
        let at = self.children.iter().position(|node| matches!(node, Node::Element(e) if e.name == name));
        let at = at.unwrap_or_else(|| {
            self.push(Element::new(name));
            self.children.len() - 1
        });
        match &mut self.children[at] {
            Node::Element(element) => element,
            Node::Text(_) | Node::Verbatim(_) => unreachable!("the position holds an element"),
        }
    }

    /// Removes child elements of a name; says whether there were any.
    pub fn remove(&mut self, name: &str) -> bool {
        let before = self.children.len();
        self.children.retain(|node| !matches!(node, Node::Element(element) if element.name == name));
        self.children.len() < before
    }

    /// The element's own text, all of it.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for node in &self.children {
            if let Node::Text(part) = node {
                text.push_str(part);
            }
        }
        text
    }

    /// Replaces the whole content with text.
    pub fn set_text(&mut self, text: impl Into<String>) {
        self.children = vec![Node::Text(text.into())];
    }

    /// Text of a child, trimmed; `None` where there is no such child.
    pub fn child_text(&self, name: &str) -> Option<String> {
        self.get(name).map(|child| child.text().trim().to_owned())
    }

    /// Attribute of a child.
    pub fn child_attribute(&self, child: &str, attribute: &str) -> Option<&str> {
        self.get(child)?.attribute(attribute)
    }
}
