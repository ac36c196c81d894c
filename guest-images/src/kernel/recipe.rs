//! What a kernel is made from: configuration fragments and a patch, carried inside the program.

use super::Flavour;
use crate::cache;

const BASE_CONFIG: &str = include_str!("../../kernel/base.config");
const STANDARD_CONFIG: &str = include_str!("../../kernel/standard.config");
const RING3_CONFIG: &str = include_str!("../../kernel/ring3.config");
const RING3_PATCH: &str = include_str!("../../kernel/ring3.patch");

/// Raised when the steps of `compile` make another kernel of the same parts.
const STEPS: &str = "1";

/// The parts of one flavour.
pub(super) struct Recipe {
    pub flavour: Flavour,
    /// Fragments for `make allnoconfig`, later ones win.
    fragments: [&'static str; 2],
    pub patch: Option<&'static str>,
    /// What `make` builds.
    pub targets: &'static [&'static str],
    /// About how many files `make` makes, for progress.
    pub objects: u64,
}

/// The recipe of a flavour.
pub(super) fn of(flavour: Flavour) -> Recipe {
    match flavour {
        Flavour::Standard => Recipe {
            flavour,
            fragments: [BASE_CONFIG, STANDARD_CONFIG],
            patch: None,
            targets: &["vmlinux", "bzImage"],
            objects: 2150,
        },
        Flavour::Ring3 => Recipe {
            flavour,
            fragments: [BASE_CONFIG, RING3_CONFIG],
            patch: Some(RING3_PATCH),
            targets: &["vmlinux"],
            objects: 1900,
        },
    }
}

impl Recipe {
    /// Changes when anything changes that the kernel is made from.
    pub fn hash(&self) -> String {
        let patch = self.patch.unwrap_or_default();
        let parts = self.fragments.into_iter().chain([patch, STEPS]).chain(self.targets.iter().copied());
        cache::hash(parts.map(str::as_bytes))
    }

    /// All fragments in one, for KCONFIG_ALLCONFIG.
    pub fn fragment(&self) -> String {
        self.fragments.concat()
    }

    /// Lines of the fragments that the finished `config` does not have. An option counts as off when it is absent.
    pub fn lost_options(&self, config: &str) -> Vec<&'static str> {
        let is_set =
            |name: &str| config.lines().any(|line| line.split_once('=').is_some_and(|(key, _)| key == name));
        let holds = |line: &str| match option_turned_off(line) {
            Some(name) => !is_set(name),
            None => config.lines().any(|other| other == line),
        };
        let lines = self.fragments.into_iter().flat_map(str::lines);
        let options = lines.filter(|line| line.starts_with("CONFIG_") || option_turned_off(line).is_some());
        options.filter(|line| !holds(line)).collect()
    }
}

/// The option in `# CONFIG_X is not set`.
fn option_turned_off(line: &str) -> Option<&str> {
    line.strip_prefix("# ")?.strip_suffix(" is not set").filter(|name| name.starts_with("CONFIG_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_follows_every_part() {
        let hash = |change: fn(&mut Recipe)| {
            let mut recipe = of(Flavour::Ring3);
            change(&mut recipe);
            recipe.hash()
        };
        let same = hash(|_| {});
        assert_eq!(same, hash(|_| {}));
        assert_ne!(same, hash(|recipe| recipe.fragments[0] = "CONFIG_64BIT=y\n"));
        assert_ne!(same, hash(|recipe| recipe.fragments[1] = ""));
        assert_ne!(same, hash(|recipe| recipe.patch = None));
        assert_ne!(same, hash(|recipe| recipe.targets = &["vmlinux", "bzImage"]));
        assert_ne!(same, of(Flavour::Standard).hash());
    }

    #[test]
    fn options_that_do_not_survive_are_found() {
        let recipe = Recipe {
            fragments: ["# Why.\nCONFIG_A=y\nCONFIG_N=32\n", "# CONFIG_B is not set\n"],
            ..of(Flavour::Ring3)
        };
        assert!(recipe.lost_options("CONFIG_A=y\nCONFIG_N=32\n# CONFIG_B is not set\n").is_empty());
        assert!(recipe.lost_options("CONFIG_A=y\nCONFIG_N=32\nCONFIG_BC=y\n").is_empty());
        let lost = recipe.lost_options("CONFIG_AB=y\nCONFIG_N=64\nCONFIG_B=y\n");
        assert_eq!(lost, ["CONFIG_A=y", "CONFIG_N=32", "# CONFIG_B is not set"]);
    }

    #[test]
    fn no_option_is_asked_for_twice() {
        for recipe in [of(Flavour::Standard), of(Flavour::Ring3)] {
            let fragment = recipe.fragment();
            let mut names: Vec<&str> = fragment
                .lines()
                .filter_map(|line| option_turned_off(line).or(line.split_once('=').map(|(name, _)| name)))
                .filter(|name| name.starts_with("CONFIG_"))
                .collect();
            let count = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), count, "{}", recipe.flavour);
        }
    }
}
