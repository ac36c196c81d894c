//! A command as the kernel's parser of its command line gives it to init (`next_arg` in Linux' lib/cmdline.c).

use std::ffi::OsString;

use crate::exit::UsageError;

/// Words that the kernel hands to init; with one more it panics (CONFIG_INIT_ENV_ARG_LIMIT).
const MAX_WORDS: usize = 32;

/// `words` as one text that the kernel splits into the same words.
pub fn init_arguments(words: &[OsString]) -> Result<String, UsageError> {
    if words.len() > MAX_WORDS {
        return Err(UsageError(format!(
            "the command has {} words, and the kernel passes {MAX_WORDS} on; put them into a script in the guest",
            words.len()
        )));
    }
    let quoted = words.iter().map(quote).collect::<Result<Vec<_>, _>>()?;
    Ok(quoted.join(" "))
}

fn quote(word: &OsString) -> Result<String, UsageError> {
    let refuse = |why| Err(UsageError(format!("cannot pass {word:?} to the guest: {why}")));
    let Some(text) = word.to_str() else { return refuse("it is not UTF-8") };
    if text.contains('"') {
        return refuse("the kernel's parser knows no way to write a double quote; use single quotes");
    }
    if text.contains(char::is_control) {
        return refuse("there is no way to write control characters; use a script in the guest");
    }
    if text == "--" {
        return refuse("the kernel stops at a second '--'; use a script in the guest");
    }
    Ok(match text.is_empty() || text.contains(is_space) {
        true => format!("\"{text}\""),
        false => text.to_owned(),
    })
}

/// The kernel's isspace looks at bytes, in Latin 1: there 0xa0 is a space, and part of many UTF-8 characters.
fn is_space(c: char) -> bool {
    let mut bytes = [0; 4];
    c.encode_utf8(&mut bytes).bytes().any(|byte| byte == b' ' || byte == 0xa0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(words: &[&str]) -> Result<String, String> {
        let words: Vec<OsString> = words.iter().map(OsString::from).collect();
        init_arguments(&words).map_err(|error| error.to_string())
    }

    #[test]
    fn words_with_spaces_are_quoted() {
        for (words, want) in [
            (&["uname", "-a"][..], "uname -a"),
            (&["sh", "-c", "echo a  b; exit 3"], "sh -c \"echo a  b; exit 3\""),
            (&["env", "A=b c"], "env \"A=b c\""),
            (&["printf", ""], "printf \"\""),
            (&["echo", "à"], "echo \"à\""),
        ] {
            assert_eq!(arguments(words).as_deref(), Ok(want));
        }
    }

    #[test]
    fn what_cannot_be_written_is_refused() {
        for word in ["a\"b", "a\nb", "a\tb", "--"] {
            assert!(arguments(&["echo", word]).unwrap_err().starts_with("cannot pass "), "{word:?}");
        }
        assert!(arguments(&["x"; 32]).is_ok());
        assert!(arguments(&["x"; 33]).unwrap_err().contains("33 words"));
    }
}
