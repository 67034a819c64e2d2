// Package corefile reads the configuration of the cluster's DNS servers, for one thing: whether what they answer depends on
// who asks. A cache answers all alike, and asks with an address of its own. So where it does depend, the cache must not
// stand between.
//
// What a plugin does is known of those that come with CoreDNS. Any other counts as one that looks at who asks: policies
// are what people write plugins for.
package corefile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/coredns/caddy/caddyfile"
)

// Bounds on what is read: a ConfigMap holds a mebibyte, and a Corefile that imports itself has no end.
const (
	maxFile    = 1 << 20
	maxFiles   = 100
	maxImports = 10 // one inside the other
	maxTokens  = 200_000
)

// Dependence is a place in a Corefile by which answers depend on who asks.
type Dependence struct {
	File   string
	Line   int
	Server string // the server block's names
	Plugin string
	Why    string // goes on after the plugin's name
}

func (d Dependence) String() string {
	return fmt.Sprintf("%s:%d: server %s has %s, which %s", d.File, d.Line, d.Server, d.Plugin, d.Why)
}

// Find reads a Corefile, and returns by what the answers at port 53 depend on who asks. An error says that it cannot be
// known.
func Find(path string) ([]Dependence, error) {
	r := &reader{root: filepath.Dir(path), snippets: map[string][]token{}, left: maxTokens}
	tokens, err := r.file(path)
	if err == nil {
		err = r.read(tokens, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("read what the cluster's DNS servers are told: %w", err)
	}
	var all []Dependence
	servers := 0
	for _, b := range r.blocks {
		if !b.atPort53() {
			continue
		}
		servers++
		body, err := r.expand(b.body, 0)
		if err != nil {
			return nil, fmt.Errorf("read what the cluster's DNS servers are told: %w", err)
		}
		for _, d := range directives(body) {
			if why := dependsBy(d); why != "" {
				all = append(all, Dependence{d[0].file, d[0].line, strings.Join(b.keys, " "), d[0].text, why})
			}
		}
	}
	if servers == 0 {
		return nil, fmt.Errorf("%s: there is no server for port 53", path)
	}
	return all, nil
}

// token is a word of a Corefile.
type token struct {
	file  string
	line  int
	text  string
	first bool // of its line
}

// block is a server block.
type block struct {
	keys []string
	body []token
}

// atPort53 says whether the block's servers are among those that pods ask. A port that is no number, such as a variable of
// the servers' environment, may be it.
func (b block) atPort53() bool {
	for _, key := range b.keys {
		scheme, rest, found := strings.Cut(key, "://")
		if !found {
			rest = key
		} else if scheme != "dns" {
			continue
		}
		port := rest[strings.LastIndexByte(rest, ':')+1:]
		if port == rest || port == "53" || port == "" || strings.Trim(port, "0123456789") != "" {
			return true
		}
	}
	return false
}

// reader reads a Corefile and what it imports. CoreDNS's own (caddyfile.Parse) puts in what is imported as often as it
// says, without an end if it imports itself.
type reader struct {
	root     string // the directory outside of which nothing is known
	blocks   []block
	snippets map[string][]token
	files    int
	left     int // how many tokens may come yet
}

func (r *reader) file(path string) ([]token, error) {
	if r.files++; r.files > maxFiles {
		return nil, fmt.Errorf("%s: more than %d files", path, maxFiles)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxFile {
		return nil, fmt.Errorf("%s: more than %d bytes", path, maxFile)
	}
	var tokens []token
	d := caddyfile.NewDispenser(path, bytes.NewReader(data))
	for d.Next() {
		tokens = append(tokens, token{path, d.Line(), d.Val(), true})
		for d.NextArg() {
			tokens = append(tokens, token{path, d.Line(), d.Val(), false})
		}
	}
	return tokens, r.take(len(tokens))
}

func (r *reader) take(tokens int) error {
	if r.left -= tokens; r.left < 0 {
		return fmt.Errorf("more than %d words, with what is imported", maxTokens)
	}
	return nil
}

// read finds the server blocks and snippets.
func (r *reader) read(tokens []token, depth int) error {
	for i := 0; i < len(tokens); {
		if isImport(tokens, i) {
			imported, err := r.imported(tokens[i], tokens[i+1].text, depth)
			if err == nil {
				err = r.read(imported, depth+1)
			}
			if err != nil {
				return err
			}
			i += 2
			continue
		}
		var b block
		begin := tokens[i]
		for more := true; i < len(tokens) && tokens[i].text != "{" && (more || !tokens[i].first); i++ {
			var key string
			if key, more = strings.CutSuffix(tokens[i].text, ","); key != "" {
				b.keys = append(b.keys, key)
			}
		}
		if i < len(tokens) && tokens[i].text == "{" {
			end := closing(tokens, i)
			if end < 0 {
				return fmt.Errorf("%s:%d: the block of %s has no end", begin.file, begin.line, begin.text)
			}
			b.body, i = tokens[i+1:end], end+1
		} else { // one block alone needs no braces
			b.body, i = tokens[i:], len(tokens)
		}
		switch {
		case len(b.keys) == 0:
			return fmt.Errorf("%s:%d: a block without a name", begin.file, begin.line)
		case len(b.keys) == 1 && strings.HasPrefix(b.keys[0], "(") && strings.HasSuffix(b.keys[0], ")"):
			r.snippets[b.keys[0][1:len(b.keys[0])-1]] = b.body
		default:
			r.blocks = append(r.blocks, b)
		}
	}
	return nil
}

// isImport says whether what follows is an import and what it imports.
func isImport(tokens []token, i int) bool {
	return tokens[i].text == "import" && i+1 < len(tokens) && !tokens[i+1].first &&
		(i == 0 || tokens[i].first || tokens[i-1].text == "{" || tokens[i-1].text == "}")
}

// closing finds the end of the braces that are opened at i, or returns -1.
func closing(tokens []token, i int) int {
	for depth := 0; i < len(tokens); i++ {
		switch tokens[i].text {
		case "{":
			depth++
		case "}":
			if depth--; depth == 0 {
				return i
			}
		}
	}
	return -1
}

// imported returns what an import stands for: a snippet, or files.
func (r *reader) imported(at token, what string, depth int) ([]token, error) {
	if depth >= maxImports {
		return nil, fmt.Errorf("%s:%d: more than %d imports one inside the other", at.file, at.line, maxImports)
	}
	if snippet, found := r.snippets[what]; found {
		return snippet, r.take(len(snippet))
	}
	pattern := what
	if !filepath.IsAbs(pattern) {
		pattern = filepath.Join(filepath.Dir(at.file), pattern)
	}
	// Of a directory that is not here, nothing matches a pattern, either: it is there in the servers' pods.
	inside, err := filepath.Rel(r.root, pattern)
	if err == nil && filepath.IsLocal(inside) {
		_, err = os.Stat(filepath.Dir(pattern))
	} else {
		err = errors.New("it is in another directory than the Corefile")
	}
	var paths []string
	if err == nil {
		paths, err = filepath.Glob(pattern)
	}
	if err == nil && len(paths) == 0 && !strings.ContainsAny(pattern, "*?[]") {
		err = os.ErrNotExist
	}
	if err != nil {
		return nil, fmt.Errorf("%s:%d: what it imports from %s is not known here: %w", at.file, at.line, what, err)
	}
	var all []token
	for _, path := range paths {
		tokens, err := r.file(path)
		if err != nil {
			return nil, err
		}
		all = append(all, tokens...)
	}
	return all, nil
}

// expand puts in what is imported.
func (r *reader) expand(tokens []token, depth int) ([]token, error) {
	var all []token
	for i := 0; i < len(tokens); i++ {
		if !isImport(tokens, i) {
			all = append(all, tokens[i])
			continue
		}
		imported, err := r.imported(tokens[i], tokens[i+1].text, depth)
		if err == nil {
			imported, err = r.expand(imported, depth+1)
		}
		if err != nil {
			return nil, err
		}
		begin := len(all)
		all = append(all, imported...)
		if begin < len(all) {
			all[begin].first = true
		}
		i++
	}
	return all, nil
}

// directives are the lines of a server block, each with the block that is its own.
func directives(body []token) [][]token {
	var all [][]token
	for i := 0; i < len(body); {
		begin, depth := i, 0
		for i++; i < len(body); i++ {
			switch body[i].text {
			case "{":
				depth++
				continue
			case "}":
				depth--
				continue
			}
			if depth <= 0 && body[i].first {
				break
			}
		}
		all = append(all, body[begin:i])
	}
	return all
}
