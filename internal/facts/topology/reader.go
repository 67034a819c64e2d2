package topology

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

const (
	// maxFile and maxVisits bound the work that a hostile file can cause: aliases let a small file
	// describe a large tree.
	maxFile   = 1 << 20
	maxVisits = 200_000
	// maxNodes is a whole cluster of nodes with room to spare.
	maxNodes = 250
	// maxMounts bounds the mounts, taints or manifests of one list.
	maxMounts = 64
)

// reader turns YAML nodes into the spec types and collects what does not fit. It works on nodes rather
// than on Go structs because only nodes know their line and column.
type reader struct {
	problems
	file   string
	visits int
}

// fields maps the name of each field that is allowed to what reads it.
type fields map[string]func(n *yaml.Node, at source)

var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)

// document returns the root of the only document in data, or nil after a problem.
func (r *reader) document(data []byte) *yaml.Node {
	at := source{file: r.file}
	if len(data) > maxFile {
		r.add(at, "", "%d bytes long; want at most %d", len(data), maxFile)
		return nil
	}
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	var doc, next yaml.Node
	if err := decoder.Decode(&doc); err != nil {
		r.syntax(err)
		return nil
	}
	if err := decoder.Decode(&next); err == nil {
		r.add(r.at(&next, ""), "", "a second YAML document; want one lab in a file")
	} else if !errors.Is(err, io.EOF) {
		r.syntax(err)
	}
	if len(doc.Content) == 0 || r.isNull(doc.Content[0]) {
		r.syntax(io.EOF)
		return nil
	}
	return doc.Content[0]
}

// syntax reports what the YAML parser said, at the line that it named.
func (r *reader) syntax(err error) {
	at := source{file: r.file}
	if errors.Is(err, io.EOF) {
		r.add(at, "", "empty; want at least apiVersion: %s and kind: %s", APIVersion, Kind)
		return
	}
	message := err.Error()
	if m := yamlLine.FindStringSubmatch(message); m != nil {
		message = message[len(m[0]):]
		if at.line, _ = strconv.Atoi(m[1]); at.line > 0 {
			at.column = 1
		}
	}
	r.add(at, "", "not YAML: %s", message)
}

func (r *reader) at(n *yaml.Node, field string) source {
	return source{file: r.file, line: n.Line, column: n.Column, field: field}
}

func (r *reader) isNull(n *yaml.Node) bool {
	return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null"
}

// resolve follows an alias to what it stands for and counts the visit.
func (r *reader) resolve(n *yaml.Node) (*yaml.Node, bool) {
	r.visits++
	if r.visits == maxVisits {
		r.add(source{file: r.file}, "", "too large once its aliases are followed; write it without them")
	}
	if r.visits >= maxVisits {
		return n, false
	}
	if n.Kind == yaml.AliasNode && n.Alias != nil {
		n = n.Alias
	}
	return n, true
}

// pairs calls each for every key of a mapping and reports duplicates.
func (r *reader) pairs(n *yaml.Node, at source, what string, each func(key string, keyAt source, value *yaml.Node)) {
	n, ok := r.resolve(n)
	if !ok || r.isNull(n) {
		return
	}
	if n.Kind != yaml.MappingNode {
		r.add(at, scalarText(n), "%s; want %s", kindOf(n), what)
		return
	}
	first := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k := n.Content[i]
		path := k.Value
		if at.field != "" {
			path = at.field + "." + path
		}
		keyAt := r.at(k, path)
		if k.Kind != yaml.ScalarNode {
			r.add(r.at(k, at.field), "", "%s as a key; want a word", kindOf(k))
			continue
		}
		if line, dup := first[k.Value]; dup {
			r.add(keyAt, "", "given twice, first on line %d; remove one", line)
			continue
		}
		first[k.Value] = k.Line
		each(k.Value, keyAt, n.Content[i+1])
	}
}

// mapping reads a mapping whose fields are known.
func (r *reader) mapping(n *yaml.Node, at source, known fields) {
	r.pairs(n, at, "a mapping of fields", func(key string, keyAt source, value *yaml.Node) {
		read, ok := known[key]
		if !ok {
			names := make([]string, 0, len(known))
			for name := range known {
				names = append(names, name)
			}
			slices.Sort(names)
			r.add(keyAt, "", "unknown field; %s", didYouMean(key, names))
			return
		}
		value, ok = r.resolve(value)
		if !ok || r.isNull(value) {
			return
		}
		read(value, r.at(value, keyAt.field))
	})
}

// list calls each for every entry of a list of at most limit entries.
func (r *reader) list(n *yaml.Node, at source, limit int, each func(n *yaml.Node, at source)) {
	if n.Kind != yaml.SequenceNode {
		r.add(at, scalarText(n), "%s; want a list", kindOf(n))
		return
	}
	if len(n.Content) > limit {
		r.add(at, strconv.Itoa(len(n.Content)), "too many entries; want at most %d", limit)
		return
	}
	for i, entry := range n.Content {
		entry, ok := r.resolve(entry)
		if !ok {
			return
		}
		each(entry, r.at(entry, fmt.Sprintf("%s[%d]", at.field, i)))
	}
}

// textInto returns a reader of one string. Numbers and booleans are refused: `name: 1` is more often a
// mistake than a name.
func (r *reader) textInto(v *text) func(*yaml.Node, source) {
	return func(n *yaml.Node, at source) {
		if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" {
			r.add(at, scalarText(n), "%s; want text%s", kindOf(n), quoteHint(n))
			v.at = at
			return
		}
		*v = text{value: n.Value, at: at, set: true}
	}
}

// texts reads a list of strings.
func (r *reader) texts(n *yaml.Node, at source) []text {
	var texts []text
	r.list(n, at, maxMounts, func(n *yaml.Node, at source) {
		var v text
		if r.textInto(&v)(n, at); v.set {
			texts = append(texts, v)
		}
	})
	return texts
}

// scalarInto returns a reader of any single value, as it is written.
func (r *reader) scalarInto(v *text) func(*yaml.Node, source) {
	return func(n *yaml.Node, at source) {
		if n.Kind != yaml.ScalarNode {
			r.add(at, "", "%s; want a single value", kindOf(n))
			return
		}
		*v = text{value: n.Value, at: at, set: true}
	}
}

// missing reports whether the field was not there; one with a value of the wrong type was.
func (v item[T]) missing() bool { return !v.set && v.at == (source{}) }

func (r *reader) numberInto(v *number) func(*yaml.Node, source) {
	return func(n *yaml.Node, at source) {
		var i int
		if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!int" || n.Decode(&i) != nil {
			r.add(at, scalarText(n), "%s; want a whole number", kindOf(n))
			return
		}
		*v = number{value: i, at: at, set: true}
	}
}

func (r *reader) boolInto(v *item[bool]) func(*yaml.Node, source) {
	return func(n *yaml.Node, at source) {
		var b bool
		if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!bool" || n.Decode(&b) != nil {
			r.add(at, scalarText(n), "%s; want true or false", kindOf(n))
			return
		}
		*v = item[bool]{value: b, at: at, set: true}
	}
}

// textsInto returns a reader of a mapping from words to single values.
func (r *reader) textsInto(m *map[string]text) func(*yaml.Node, source) {
	return func(n *yaml.Node, at source) {
		*m = map[string]text{}
		r.pairs(n, at, "a mapping of names to values", func(key string, keyAt source, value *yaml.Node) {
			value, ok := r.resolve(value)
			if !ok {
				return
			}
			var v text
			if r.isNull(value) {
				v = text{at: keyAt, set: true}
			} else {
				r.scalarInto(&v)(value, r.at(value, keyAt.field))
			}
			if v.set {
				(*m)[key] = v
			}
		})
	}
}

// valuesInto returns a reader of a mapping from words to single values, or to lists of such.
func (r *reader) valuesInto(m *map[string][]text) func(*yaml.Node, source) {
	return func(n *yaml.Node, at source) {
		*m = map[string][]text{}
		r.pairs(n, at, "a mapping of names to values", func(key string, keyAt source, value *yaml.Node) {
			value, ok := r.resolve(value)
			if !ok {
				return
			}
			if r.isNull(value) {
				(*m)[key] = []text{{at: keyAt, set: true}}
				return
			}
			var values []text
			one := func(n *yaml.Node, at source) {
				var v text
				if r.scalarInto(&v)(n, at); v.set {
					values = append(values, v)
				}
			}
			valueAt := r.at(value, keyAt.field)
			if value.Kind != yaml.SequenceNode {
				one(value, valueAt)
			} else if len(value.Content) == 0 {
				r.add(valueAt, "", "an empty list; want a value for each time that the flag is given, or leave the flag out")
			} else {
				r.list(value, valueAt, maxMounts, one)
			}
			if len(values) > 0 {
				(*m)[key] = values
			}
		})
	}
}

func (r *reader) boolsInto(m *map[string]item[bool]) func(*yaml.Node, source) {
	return func(n *yaml.Node, at source) {
		*m = map[string]item[bool]{}
		r.pairs(n, at, "a mapping of names to true or false", func(key string, keyAt source, value *yaml.Node) {
			value, ok := r.resolve(value)
			if !ok {
				return
			}
			var v item[bool]
			r.boolInto(&v)(value, r.at(value, keyAt.field))
			if v.set {
				(*m)[key] = v
			}
		})
	}
}

// scalarText is what a problem quotes: single values only.
func scalarText(n *yaml.Node) string {
	if n.Kind != yaml.ScalarNode {
		return ""
	}
	if len(n.Value) > 80 {
		return strings.ToValidUTF8(n.Value[:77], "") + "..."
	}
	return n.Value
}

// kindOf names the kind of a node in plain words.
func kindOf(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	case yaml.ScalarNode:
		switch n.ShortTag() {
		case "!!str":
			return "text"
		case "!!int", "!!float":
			return "a number"
		case "!!bool":
			return "true or false"
		case "!!null":
			return "nothing"
		}
		return "a value of type " + n.ShortTag()
	}
	return "something unexpected"
}

// quoteHint says how a number becomes text.
func quoteHint(n *yaml.Node) string {
	if n.Kind == yaml.ScalarNode {
		return fmt.Sprintf(", in quotes: %q", scalarText(n))
	}
	return ""
}
