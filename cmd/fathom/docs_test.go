package main

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/fathom-network/fathom/internal/testenv"
)

var update = flag.Bool("update", false, "write the commands and flags into docs/commands.md")

const (
	repository = "../.."
	reference  = repository + "/docs/commands.md"
)

// tree is the command tree as a user meets it.
func tree() (*app, *cobra.Command) {
	a := &app{}
	root := a.root()
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	return a, root
}

// documented are the commands that docs/commands.md has an entry for: all but hidden ones, and those that
// cobra makes below completion.
func documented(root *cobra.Command) []*cobra.Command {
	all := []*cobra.Command{root}
	for _, c := range root.Commands() {
		switch {
		case c.Hidden || c.Name() == "help":
		case c.Name() == "completion":
			all = append(all, c)
		default:
			all = append(all, documented(c)...)
		}
	}
	return all
}

// TestCommandReference holds docs/commands.md to the command tree: between the two comments around each entry
// stands what entry makes of the command, and there is an entry for each command and for nothing else.
// `go test ./cmd/fathom -update` writes the entries; what stands between them is written by hand.
func TestCommandReference(t *testing.T) {
	data, err := os.ReadFile(reference)
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	_, root := tree()
	known := map[string]bool{}
	for _, c := range documented(root) {
		begin := "<!-- command: " + c.CommandPath() + " -->\n"
		known[begin] = true
		before, rest, found := strings.Cut(text, begin)
		if !found {
			t.Errorf("docs/commands.md has no entry for `%s`: write %q and %q where it is to be, and then go test ./cmd/fathom -update", c.CommandPath(), begin, end)
			continue
		}
		have, after, found := strings.Cut(rest, end)
		if !found {
			t.Fatalf("docs/commands.md: the entry for `%s` does not end with %q", c.CommandPath(), end)
		}
		want := entry(c)
		if have != want && !*update {
			t.Errorf("docs/commands.md differs from `%s --help`: go test ./cmd/fathom -update\n--- have\n%s--- want\n%s", c.CommandPath(), have, want)
		}
		text = before + begin + want + end + after
	}
	for _, begin := range regexp.MustCompile(`<!-- command: .* -->\n`).FindAllString(text, -1) {
		if !known[begin] {
			t.Errorf("docs/commands.md has an entry for a command that is not there: %s", begin)
		}
		delete(known, begin) // a second one is one too many
	}
	if *update && text != string(data) {
		if err := os.WriteFile(reference, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

const end = "<!-- end -->\n"

// entry writes what the command's help says.
func entry(c *cobra.Command) string {
	var b strings.Builder
	if c.HasParent() {
		level := strings.Count(c.CommandPath(), " ")
		_, use, _ := strings.Cut(c.Use, " ")
		fmt.Fprintf(&b, "%s %s\n\n%s.\n", strings.Repeat("#", min(level+2, 4)), c.CommandPath(), strings.TrimSuffix(c.Short, "."))
		lines := []string{strings.TrimSpace(c.CommandPath() + " " + use)}
		for line := range strings.Lines(c.Example) {
			if line = strings.TrimSpace(line); line != lines[0] {
				lines = append(lines, line)
			}
		}
		if !c.HasAvailableSubCommands() {
			fmt.Fprintf(&b, "\n```sh\n%s\n```\n", strings.Join(lines, "\n"))
		}
	}
	var rows []string
	c.LocalFlags().VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		value, usage := pflag.UnquoteUsage(f)
		name := strings.TrimSpace("--" + f.Name + " " + value)
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + ", " + name
		}
		if d := f.DefValue; d != "" && d != "0" && d != "-1" && d != "false" {
			usage += fmt.Sprintf(" (default `%s`)", d)
		}
		rows = append(rows, fmt.Sprintf("| `%s` | %s |\n", name, usage))
	})
	if len(rows) > 0 {
		fmt.Fprintf(&b, "\n| flag | meaning |\n| --- | --- |\n%s", strings.Join(rows, ""))
	}
	return b.String()
}

// pages are the Markdown files of the repository.
func pages(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(repository, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != repository && (strings.HasPrefix(d.Name(), ".") || d.Name() == "bin" || d.Name() == "testdata"):
			return fs.SkipDir
		case !d.IsDir() && filepath.Ext(path) == ".md":
			data, err := os.ReadFile(path)
			all[path] = string(data)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 5 {
		t.Fatalf("only %d pages are found", len(all))
	}
	return all
}

var (
	fence      = regexp.MustCompile("(?ms)^```(\\w*)\n(.*?)^```$")
	inlineCode = regexp.MustCompile("`([^`\n]+)`")
	makeTarget = regexp.MustCompile(`(?m)^([a-z0-9-]+):`)
)

// TestExamples checks every command line of fathom, and every make target, that the documentation shows:
// the command and its flags exist, and it has the arguments that it wants.
func TestExamples(t *testing.T) {
	makefile, err := os.ReadFile(repository + "/Makefile")
	if err != nil {
		t.Fatal(err)
	}
	var targets []string
	for _, m := range makeTarget.FindAllStringSubmatch(string(makefile), -1) {
		targets = append(targets, m[1])
	}
	checked := 0
	check := func(where, line string, whole bool) {
		words := commandWords(line)
		if len(words) == 0 {
			return
		}
		switch words[0] {
		case "fathom", "bin/fathom":
			checked++
			if err := parses(words[1:], whole); err != nil {
				t.Errorf("%s: %s: %v", where, line, err)
			}
		case "make":
			for _, target := range words[1:] {
				if !strings.ContainsAny(target, "=-$…") && strings.ToLower(target) == target && !slices.Contains(targets, target) {
					t.Errorf("%s: %s: the Makefile has no target %s", where, line, target)
				}
			}
		}
	}
	for path, text := range pages(t) {
		for _, m := range fence.FindAllStringSubmatch(text, -1) {
			if m[1] == "go" || m[1] == "yaml" || m[1] == "json" {
				continue
			}
			for line := range strings.Lines(strings.ReplaceAll(m[2], "\\\n", " ")) {
				line = strings.TrimSpace(line)
				if m[1] == "console" && !strings.HasPrefix(line, "# ") && !strings.HasPrefix(line, "$ ") {
					continue // what the command printed
				}
				check(path, line, true)
			}
		}
		for _, m := range inlineCode.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
			check(path, m[1], false)
		}
	}
	_, root := tree()
	for _, c := range documented(root) {
		for line := range strings.Lines(c.Example) {
			check(c.CommandPath()+" --help", strings.TrimSpace(line), true)
		}
	}
	if checked < 20 {
		t.Errorf("only %d command lines are found", checked)
	}
}

// commandWords splits a command line as a shell does, roughly, up to what joins it to the next one.
func commandWords(line string) []string {
	line = strings.TrimPrefix(strings.TrimPrefix(line, "$ "), "# ")
	line = strings.NewReplacer("[", "", "]", "").Replace(line) // of what is optional
	var words []string
	var word strings.Builder
	var quote rune
	inWord := false
	flush := func() {
		if inWord {
			words = append(words, word.String())
		}
		word.Reset()
		inWord = false
	}
scan:
	for _, r := range line {
		switch {
		case quote != 0 && r == quote:
			quote = 0
		case quote == 0 && (r == '\'' || r == '"'):
			quote, inWord = r, true
		case quote == 0 && (r == ' ' || r == '\t'):
			flush()
		case quote == 0 && (strings.ContainsRune("|;<>&", r) || r == '#' && !inWord):
			break scan
		default:
			word.WriteRune(r)
			inWord = true
		}
	}
	flush()
	for len(words) > 0 && (words[0] == "sudo" || strings.Contains(words[0], "=")) {
		words = words[1:]
	}
	return words
}

// parses says what is wrong with a command line of fathom. One in running text need not be whole.
func parses(args []string, whole bool) error {
	if len(args) > 0 && args[0] == "COMMAND" {
		return nil
	}
	a, root := tree()
	cmd, rest, err := root.Find(args)
	if err != nil {
		return err
	}
	if cmd.DisableFlagParsing {
		rest, _, err = a.ownFlags(rest)
		if err == nil && whole && len(rest) == 0 {
			err = errors.New("kubectl's arguments are missing")
		}
		return err
	}
	cmd.InitDefaultHelpFlag()
	if slices.Equal(rest, []string{"…"}) {
		return nil
	}
	if err := cmd.ParseFlags(rest); err != nil {
		return err
	}
	rest = cmd.Flags().Args()
	if cmd.HasAvailableSubCommands() || whole {
		return cmd.ValidateArgs(rest)
	}
	return nil
}

var link = regexp.MustCompile(`\]\(([^)\s]+)\)`)

// TestLinks checks that what a page of the repository links to in the repository is there.
func TestLinks(t *testing.T) {
	all := pages(t)
	for path, text := range all {
		for _, m := range link.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
			if strings.Contains(m[1], "://") || strings.HasPrefix(m[1], "mailto:") {
				continue
			}
			file, anchor, _ := strings.Cut(m[1], "#")
			target := path
			if file != "" {
				target = filepath.Join(filepath.Dir(path), file)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s links to %s, which is not there", path, m[1])
				continue
			}
			if anchor != "" && !slices.Contains(anchors(all[target]), anchor) {
				t.Errorf("%s links to %s, which has no such heading", path, m[1])
			}
		}
	}
}

var notInAnchor = regexp.MustCompile(`[^\w\- ]`)

// anchors are the names that headings get on the web.
func anchors(text string) []string {
	var all []string
	for line := range strings.Lines(fence.ReplaceAllString(text, "")) {
		if heading, found := strings.CutPrefix(strings.TrimLeft(line, "#"), " "); found && strings.HasPrefix(line, "#") {
			all = append(all, strings.ReplaceAll(notInAnchor.ReplaceAllString(strings.ToLower(strings.TrimSpace(heading)), ""), " ", "-"))
		}
	}
	return all
}

// TestPluginOfTheDocs runs the plugin of docs/networks.md for two pods, in namespaces that end with the test.
func TestPluginOfTheDocs(t *testing.T) {
	testenv.NeedRoot(t)
	page, err := os.ReadFile(repository + "/docs/networks.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(page), "<!-- file: mynet -->\n```sh\n")
	plugin, _, found := strings.Cut(rest, "```\n")
	if !found {
		t.Fatal("docs/networks.md has no plugin")
	}
	path := filepath.Join(t.TempDir(), "mynet")
	if err := os.WriteFile(path, []byte(plugin), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--net", "--mount", "sh", "-euc", `
		PATH=$PATH:/usr/sbin:/sbin
		for dir in /var /run; do mount -t tmpfs none $dir; done
		mkdir -p /var/log /var/lib/cni
		call() { CNI_COMMAND=$1 CNI_CONTAINERID=$2 CNI_NETNS=/run/netns/$2 CNI_IFNAME=eth0 "$0" <<-EOF
			{"cniVersion": "0.3.1", "name": "mynet", "type": "mynet", "subnet": "10.244.1"}
			EOF
		}
		CNI_COMMAND=VERSION "$0" </dev/null
		for pod in one two; do ip netns add $pod; call ADD $pod; done
		ip netns exec one ping -c1 -W2 10.244.1.3
		ip netns exec one ip route
		for pod in one two two; do call DEL $pod; done
		ls /var/lib/cni/mynet
		cat /var/log/mynet.log`, path)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{
		`"supportedVersions": ["0.3.1"]`, `"address": "10.244.1.2/24"`, `"address": "10.244.1.3/24"`, `"gateway": "10.244.1.1"`,
		"1 received", "default via 10.244.1.1 dev eth0", "ADD one", "DEL two",
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("%q is missing", want)
		}
	}
	if strings.Contains(string(out), "\n10.244.1.2\n") {
		t.Error("an address stays in use after DEL")
	}
	if t.Failed() {
		t.Logf("%s", out)
	}
}
