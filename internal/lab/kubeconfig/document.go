package kubeconfig

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
	sigsyaml "sigs.k8s.io/yaml"
)

// document is the text of a kubeconfig with the positions of its parts. Only its first YAML document counts: kubectl reads
// no other. An edit replaces a range of the text and parses the result again.
//
// Rejected: a YAML library that writes the document back. Some keep comments, but none keeps every byte (indentation,
// quoting, blank lines, line endings).
type document struct {
	text    []byte
	root    *yaml.Node // nil if there are only blank lines and comments
	lines   []int      // the offset of each line's start
	newline string
}

const byteOrderMark = "\ufeff"

// parse parses text. It rejects duplicate keys at the top level: parsers disagree on which of them counts.
func parse(text []byte) (*document, error) {
	if !utf8.Valid(text) {
		return nil, fmt.Errorf("it is not valid UTF-8")
	}
	d := &document{text: text, newline: "\n"}
	var n yaml.Node
	if err := yaml.Unmarshal(text, &n); err != nil {
		return nil, err
	}
	d.lines = append(d.lines, len(text)-len(bytes.TrimPrefix(text, []byte(byteOrderMark))))
	for i := 0; i < len(text); {
		size := lineBreak(text[i:])
		if size > 0 {
			if len(d.lines) == 1 && size == 2 && text[i] == '\r' {
				d.newline = "\r\n"
			}
			d.lines = append(d.lines, i+size)
		}
		i += max(size, 1)
	}
	if len(n.Content) > 0 && n.Content[0].Tag != "!!null" {
		d.root = n.Content[0]
		if d.root.Kind != yaml.MappingNode {
			return nil, fmt.Errorf("it is not a mapping")
		}
		seen := map[string]bool{}
		for i := 0; i < len(d.root.Content); i += 2 {
			key := d.root.Content[i].Value
			if seen[key] {
				return nil, fmt.Errorf("it has two keys %q", key)
			}
			seen[key] = true
		}
	}
	return d, nil
}

// lineBreak returns the length of the line break that b begins with: YAML 1.1 has five kinds, section 4.2.
func lineBreak(b []byte) int {
	for _, s := range []string{"\r\n", "\n", "\r", "\u0085", "\u2028", "\u2029"} {
		if bytes.HasPrefix(b, []byte(s)) {
			return len(s)
		}
	}
	return 0
}

// splice replaces the bytes from..to and parses the document again.
func (d *document) splice(from, to int, with string) error {
	text := make([]byte, 0, len(d.text)+len(with))
	text = append(append(append(text, d.text[:from]...), with...), d.text[to:]...)
	next, err := parse(text)
	if err != nil {
		return refuse("the edit would damage it: %v", err)
	}
	next.newline = d.newline // the edit may have removed the only line break
	*d = *next
	return nil
}

// insertLines inserts whole lines, each with its line break, at the start of a line. If the text did not end with a line
// break, it does not afterwards either.
func (d *document) insertLines(at int, lines string) error {
	lines = strings.ReplaceAll(lines, "\n", d.newline)
	if at == len(d.text) && at > d.lines[0] && !d.endsLine() {
		lines = d.newline + strings.TrimSuffix(lines, d.newline)
	}
	return d.splice(at, at, lines)
}

// deleteLines is the inverse of insertLines.
func (d *document) deleteLines(from, to int) error {
	if to == len(d.text) && from > d.lines[0] && !d.endsLine() {
		from -= len(d.newline)
	}
	return d.splice(from, to, "")
}

// endsLine reports whether the text ends with a line break.
func (d *document) endsLine() bool { return d.lines[len(d.lines)-1] == len(d.text) }

// lineStart returns the offset of the start of a line, counted from 1 as in yaml.Node, or of the text's end.
func (d *document) lineStart(line int) int {
	if line > len(d.lines) {
		return len(d.text)
	}
	return d.lines[line-1]
}

func (d *document) lineText(line int) string {
	return string(d.text[d.lineStart(line):d.lineStart(line+1)])
}

// offset returns the start of a node. A yaml.Node has a line and a column, both counted from 1, the column in characters.
func (d *document) offset(n *yaml.Node) int {
	at := d.lineStart(n.Line)
	for i := 1; i < n.Column && at < len(d.text); i++ {
		_, size := utf8.DecodeRune(d.text[at:])
		at += size
	}
	return at
}

// isFlow reports whether a node is in flow style, as in JSON.
func isFlow(n *yaml.Node) bool { return n.Style&yaml.FlowStyle != 0 }

// find returns the key and value nodes of a key at the top level, and the index of the key in the root's content, or -1.
func (d *document) find(key string) (k, v *yaml.Node, index int) {
	if d.root != nil {
		for i := 0; i < len(d.root.Content); i += 2 {
			if d.root.Content[i].Value == key {
				return d.root.Content[i], d.root.Content[i+1], i
			}
		}
	}
	return nil, nil, -1
}

// afterColon returns the offset after a key's colon.
func (d *document) afterColon(k *yaml.Node) (int, error) {
	at, err := d.scalarEnd(k, d.offset(k))
	if err != nil {
		return 0, err
	}
	for at < len(d.text) && (d.text[at] == ' ' || d.text[at] == '\t') {
		at++
	}
	if at == len(d.text) || d.text[at] != ':' {
		return 0, refuse("the key %q in line %d is not followed by a colon", k.Value, k.Line)
	}
	return at + 1, nil
}

// scalarEnd returns the end of the scalar that starts at an offset. It rejects scalars whose text is more than their value
// with or without quotes: block scalars, aliases, scalars with an anchor or a tag, plain scalars of several lines.
func (d *document) scalarEnd(n *yaml.Node, at int) (int, error) {
	rest := d.text[at:]
	switch {
	case n.Kind != yaml.ScalarNode:
	case n.Style&yaml.DoubleQuotedStyle != 0 && bytes.HasPrefix(rest, []byte(`"`)),
		n.Style&yaml.SingleQuotedStyle != 0 && bytes.HasPrefix(rest, []byte(`'`)):
		if end := quotedEnd(d.text, at); end > at {
			return end, nil
		}
	case n.Style == 0 && bytes.HasPrefix(rest, []byte(n.Value)):
		return at + len(n.Value), nil
	}
	return 0, refuse("the value in line %d is neither a plain nor a quoted word", n.Line)
}

// quotedEnd returns the offset after a quoted scalar that starts at an offset, or -1.
func quotedEnd(text []byte, at int) int {
	quote := text[at]
	for i := at + 1; i < len(text); i++ {
		switch {
		case quote == '"' && text[i] == '\\':
			i++
		case text[i] == quote && quote == '\'' && i+1 < len(text) && text[i+1] == '\'':
			i++
		case text[i] == quote:
			return i + 1
		}
	}
	return -1
}

// value returns the range of a key's value, from the colon to its end. Only scalars are supported.
func (d *document) value(k, v *yaml.Node) (from, to int, err error) {
	if from, err = d.afterColon(k); err != nil {
		return 0, 0, err
	}
	if v.Kind == yaml.ScalarNode && v.Value == "" && v.Style == 0 && v.Anchor == "" {
		return from, from, nil
	}
	to, err = d.scalarEnd(v, d.offset(v))
	return from, to, err
}

// flowEnd returns the offset after a node in [] or {} that starts at an offset.
func (d *document) flowEnd(at int) (int, error) {
	depth := 0
	for i := at; i < len(d.text); i++ {
		begins := i == at || strings.ContainsRune(" \t\r\n[{,:", rune(d.text[i-1]))
		switch c := d.text[i]; {
		case (c == '"' || c == '\'') && begins:
			end := quotedEnd(d.text, i)
			if end < 0 {
				return 0, refuse("a quoted word does not end")
			}
			i = end - 1
		case c == '#' && begins:
			for i+1 < len(d.text) && d.text[i+1] != '\n' && d.text[i+1] != '\r' {
				i++
			}
		case c == '[' || c == '{':
			depth++
		case (c == ']' || c == '}') && depth > 0:
			if depth--; depth == 0 {
				return i + 1, nil
			}
		case depth == 0 && (c == ',' || c == ']' || c == '}'):
			return at + len(bytes.TrimRight(d.text[at:i], " \t\r\n")), nil
		}
	}
	return 0, refuse("a bracket does not close")
}

// insertFlow inserts text as the first element of a flow node, with the same space after it as before the next.
func (d *document) insertFlow(n *yaml.Node, text string) error {
	open := d.offset(n)
	if open == len(d.text) || d.text[open] != '[' && d.text[open] != '{' {
		return refuse("the list in line %d does not begin with a bracket", n.Line)
	}
	if len(n.Content) == 0 {
		return d.splice(open+1, open+1, text)
	}
	first := d.offset(n.Content[0])
	space := string(d.text[open+1 : first])
	if space == "" || strings.Trim(space, " \t\r\n") != "" {
		space = " "
	}
	return d.splice(first, first, text+","+space)
}

// deleteFlow removes the element at an index from a flow node; in a mapping, the key and its value.
func (d *document) deleteFlow(n *yaml.Node, index int) error {
	width := 1
	if n.Kind == yaml.MappingNode {
		width = 2
	}
	from := d.offset(n.Content[index])
	if index+width < len(n.Content) {
		return d.splice(from, d.offset(n.Content[index+width]), "")
	}
	to, err := d.flowEnd(d.offset(n.Content[index+width-1]))
	if err != nil {
		return err
	}
	if index > 0 {
		if from, err = d.flowEnd(d.offset(n.Content[index-1])); err != nil {
			return err
		}
	}
	return d.splice(from, to, "")
}

// addKey adds a key at the top level, which must not have it yet. value is the text after the colon, with further lines.
func (d *document) addKey(key, value string) error {
	if isFlow(d.root) {
		return d.insertFlow(d.root, fmt.Sprintf("%q:%s", key, value))
	}
	// After apiVersion and kind, where each is one line, otherwise before everything. Rejected: the end of the document,
	// which is more usual but hard to find: comments, block scalars whose last line break counts, "...".
	next := 0
	for next < len(d.root.Content) {
		k, v := d.root.Content[next], d.root.Content[next+1]
		if k.Value != "apiVersion" && k.Value != "kind" || k.Line != v.Line {
			break
		}
		_, to, err := d.value(k, v)
		if err != nil {
			break
		}
		if rest := strings.TrimSpace(string(d.text[to:d.lineStart(v.Line+1)])); rest != "" && rest[0] != '#' {
			break
		}
		next += 2
	}
	first := d.root.Content[0]
	indent := strings.Repeat(" ", first.Column-1)
	if strings.TrimRight(string(d.text[d.lineStart(first.Line):d.offset(first)]), " ") != "" {
		return refuse("the first key is not at the beginning of a line")
	}
	at := d.lineStart(first.Line)
	if next > 0 {
		at = d.lineStart(d.root.Content[next-1].Line + 1)
	}
	return d.insertLines(at, indent+key+":"+strings.ReplaceAll(strings.TrimSuffix(value, "\n"), "\n", "\n"+indent)+"\n")
}

// deleteKey removes a key from the top level, whose value is empty or on the same line.
func (d *document) deleteKey(key string) error {
	k, v, index := d.find(key)
	if isFlow(d.root) {
		return d.deleteFlow(d.root, index)
	}
	if v.Line != k.Line {
		return refuse("the value of %q is not on its line", key)
	}
	return d.deleteLines(d.lineStart(k.Line), d.lineStart(k.Line+1))
}

// addItem inserts an item at the front of a list at the top level, since that place follows from the line of the key alone.
// It returns the text that was there instead of a list, if any, and whether it made the key.
func (d *document) addItem(key string, item map[string]any) (replaced *string, made bool, err error) {
	flow, err := json.Marshal(item)
	if err != nil {
		return nil, false, err
	}
	block, err := sigsyaml.Marshal([]any{item}) // as kubectl writes it
	if err != nil {
		return nil, false, err
	}
	k, v, _ := d.find(key)
	switch {
	case k == nil && isFlow(d.root):
		return nil, true, d.addKey(key, "["+string(flow)+"]")
	case k == nil:
		return nil, true, d.addKey(key, "\n"+string(block))
	case v.Kind == yaml.SequenceNode && !isFlow(v):
		return nil, false, d.insertBlock(k, d.dashIndent(v), string(block))
	case v.Kind == yaml.SequenceNode && len(v.Content) > 0:
		return nil, false, d.insertFlow(v, string(flow))
	case v.Kind != yaml.SequenceNode && v.Tag != "!!null":
		return nil, false, refuse("%q in line %d is not a list", key, k.Line)
	}
	// The value is an empty list or null.
	from, err := d.afterColon(k)
	if err != nil {
		return nil, false, err
	}
	var to int
	if v.Kind == yaml.SequenceNode {
		to, err = d.flowEnd(d.offset(v))
	} else {
		_, to, err = d.value(k, v)
	}
	if err != nil {
		return nil, false, err
	}
	was := string(d.text[from:to])
	if isFlow(d.root) {
		return &was, false, d.splice(from, to, " ["+string(flow)+"]")
	}
	if k.Line != v.Line || strings.ContainsAny(was, "\r\n") {
		return nil, false, refuse("the empty value of %q in line %d is on a line of its own", key, k.Line)
	}
	if err := d.splice(from, to, ""); err != nil {
		return nil, false, err
	}
	k, _, _ = d.find(key)
	return &was, false, d.insertBlock(k, k.Column-1, string(block))
}

// insertBlock inserts the lines of an item below the line of a key.
func (d *document) insertBlock(k *yaml.Node, indent int, block string) error {
	space := strings.Repeat(" ", indent)
	return d.insertLines(d.lineStart(k.Line+1), space+strings.ReplaceAll(strings.TrimSuffix(block, "\n"), "\n", "\n"+space)+"\n")
}

// deleteItem removes an item from a list at the top level.
func (d *document) deleteItem(key string, index int) error {
	_, list, _ := d.find(key)
	if isFlow(list) {
		return d.deleteFlow(list, index)
	}
	from, err := d.dash(list, index)
	if err != nil {
		return err
	}
	indent, limit := d.dashIndent(list), len(d.lines)+1
	if index+1 < len(list.Content) {
		if limit, err = d.dash(list, index+1); err != nil {
			return err
		}
	}
	// Lines that are indented further than the dash belong to the item, except blank lines and comments at its end.
	to := from + 1
	for line := from + 1; line < limit; line++ {
		text := d.lineText(line)
		rest := strings.TrimLeft(text, " ")
		if strings.TrimSpace(rest) == "" || rest[0] == '#' {
			continue
		}
		if len(text)-len(rest) <= indent {
			break
		}
		to = line + 1
	}
	return d.deleteLines(d.lineStart(from), d.lineStart(to))
}

// dash returns the line with the dash of an item of a block list.
func (d *document) dash(list *yaml.Node, index int) (int, error) {
	prefix := strings.Repeat(" ", d.dashIndent(list)) + "-"
	for line := list.Content[index].Line; line >= list.Line; line-- {
		if strings.HasPrefix(d.lineText(line), prefix) {
			return line, nil
		}
	}
	return 0, refuse("the list in line %d does not start on its own line", list.Line)
}

// dashIndent returns the number of spaces before the dashes of a block list. The list node itself starts at its anchor or
// tag, if it has one.
func (d *document) dashIndent(list *yaml.Node) int {
	for line := list.Line; line <= list.Content[0].Line; line++ {
		text := d.lineText(line)
		if rest := strings.TrimLeft(text, " "); strings.HasPrefix(rest, "-") {
			return len(text) - len(rest)
		}
	}
	return list.Column - 1
}

// restoreList restores what was there instead of a list that has become empty, or leaves an empty list.
func (d *document) restoreList(key string, was *string) error {
	k, v, _ := d.find(key)
	from, err := d.afterColon(k)
	if err != nil {
		return err
	}
	to, text := from, " []"
	if was != nil {
		text = *was
	} else if v.Kind == yaml.SequenceNode {
		return nil
	}
	if v.Kind == yaml.SequenceNode {
		if to, err = d.flowEnd(d.offset(v)); err != nil {
			return err
		}
	}
	return d.splice(from, to, text)
}
