//! A command line in words.
//!
//! Blanks separate words. What stands between quotes is part of a word, blanks included; within double quotes a
//! backslash takes the next character as it is. Places count characters of the line, from 0.

use alloc::{borrow::ToOwned, string::String, vec::Vec};
use core::ops::Range;

use super::ParseError;

/// A word of a command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Word {
    /// It, without its quotes.
    pub text: String,
    /// Where it stands.
    pub at: Range<usize>,
    /// Some of it was quoted: it is no option.
    pub quoted: bool,
}

/// Takes a line apart.
///
/// # Errors
/// A quote is not closed.
pub fn split(line: &str) -> Result<Vec<Word>, ParseError> {
    let mut words = Vec::new();
    let mut word: Option<Word> = None;
    let mut quote: Option<(char, usize)> = None;
    let mut escaped = false;
    for (n, c) in line.chars().enumerate() {
        match quote {
            None if c == ' ' || c == '\t' => words.extend(word.take()),
            _ => {
                let word = word.get_or_insert_with(|| Word {
                    text: String::new(),
                    at: n..n,
                    quoted: false,
                });
                word.at.end = n + 1;
                match quote {
                    _ if escaped => {
                        escaped = false;
                        word.text.push(c);
                    }
                    Some(('"', _)) if c == '\\' => escaped = true,
                    Some((open, _)) if c == open => quote = None,
                    None if c == '"' || c == '\'' => {
                        word.quoted = true;
                        quote = Some((c, n));
                    }
                    _ => word.text.push(c),
                }
            }
        }
    }
    if let Some((open, at)) = quote {
        return Err(ParseError::new(
            at..at + 1,
            "this quote is not closed".to_owned(),
            alloc::format!("end it with {open}"),
        ));
    }
    words.extend(word);
    Ok(words)
}

/// Words that are separate already, and the line that errors point into.
pub fn joined(parts: &[String]) -> (String, Vec<Word>) {
    let mut line = String::new();
    let mut length = 0;
    let mut words = Vec::new();
    for part in parts {
        if !words.is_empty() {
            line.push(' ');
            length += 1;
        }
        let end = length + part.chars().count();
        line += part;
        words.push(Word {
            text: part.clone(),
            at: length..end,
            quoted: false,
        });
        length = end;
    }
    (line, words)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(line: &str) -> Vec<String> {
        split(line).unwrap().into_iter().map(|w| w.text).collect()
    }

    #[test]
    fn quotes_hold_words_together() {
        assert_eq!(texts("  vm  show\tweb "), ["vm", "show", "web"]);
        assert_eq!(texts(r#"a="b c"d 'e "f' "#), ["a=b cd", "e \"f"]);
        assert_eq!(texts(r#""a \"b\" \\" """#), [r#"a "b" \"#, ""]);
        let words = split("ab 'c d'").unwrap();
        assert_eq!((words[1].at.clone(), words[1].quoted), (3..8, true));
    }

    #[test]
    fn an_open_quote_is_pointed_at() {
        let error = split("vm show \"web").unwrap_err();
        assert_eq!(error.at, 8..9);
    }

    #[test]
    fn separate_words_have_places_in_the_joined_line() {
        let (line, words) = joined(&["vm".into(), "a b".into()]);
        assert_eq!(line, "vm a b");
        assert_eq!(words[1].at, 3..6);
        assert_eq!(words[1].text, "a b");
    }
}
