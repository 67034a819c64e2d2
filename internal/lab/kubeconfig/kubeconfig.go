// Package kubeconfig adds contexts of labs to users' kubeconfig files and removes them again. The file belongs to the user:
// its other text stays the same byte for byte, and after the removal the file is what it was before. If an edit cannot
// guarantee that, it is rejected, and the file is not touched.
//
// Clusters, users and contexts of labs have an extension with the lab's name as their mark. An extension of the whole file
// records what an edit replaced. Unlike comments, extensions survive `kubectl config`, which rewrites the file.
package kubeconfig

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"go.yaml.in/yaml/v3"
	sigsyaml "sigs.k8s.io/yaml"
)

// Mark is the name of the extension that clusters, users and contexts of a lab have. Its value is the lab's name.
const Mark = "fathom.network/lab"

// recordName is the name of the extension that records what has to be restored.
const recordName = "fathom.network/undo"

// Entry is a context with a cluster and a user of the same name.
type Entry struct {
	Name          string
	Cluster, User json.RawMessage // a Cluster and an AuthInfo of client.authentication's v1 kubeconfig
}

// kinds are the lists of a kubeconfig that hold entries, and the field of an item next to its name.
var kinds = []struct{ list, item string }{{"clusters", "cluster"}, {"users", "user"}, {"contexts", "context"}}

// UneditableError says that a kubeconfig is written in a way that cannot be edited in place. The file is unchanged.
type UneditableError struct{ Why string }

func (e *UneditableError) Error() string { return e.Why }

func refuse(format string, args ...any) error {
	return &UneditableError{Why: fmt.Sprintf(format, args...)}
}

// IsUneditable reports whether err is an UneditableError.
func IsUneditable(err error) bool {
	var e *UneditableError
	return errors.As(err, &e)
}

// TakenError says that the kubeconfig has an entry with a name that a lab needs, and that it is not the lab's.
type TakenError struct{ Kind, Name string }

func (e *TakenError) Error() string {
	return fmt.Sprintf("it has a %s %q that is not of this lab", e.Kind, e.Name)
}

// IsTaken reports whether err is a TakenError.
func IsTaken(err error) bool {
	var e *TakenError
	return errors.As(err, &e)
}

// record is what the edits of all labs have replaced in a file.
type record struct {
	// File is true if the file did not exist, and Directories is the number of directories that were created for it.
	File        bool `json:"file,omitempty"`
	Directories int  `json:"directories,omitempty"`
	// Made lists keys at the top level that did not exist.
	Made []string `json:"made,omitempty"`
	// Replaced maps a list to the text that was there instead, from the colon on: null, or an empty list.
	Replaced map[string]string `json:"replaced,omitempty"`
	// Previous maps a lab to the text of current-context that it replaced, from the colon on; nil means that the key did
	// not exist. The text may name another lab's context, so the labs form a linked list.
	Previous map[string]*string `json:"previous,omitempty"`
}

// file is a kubeconfig with its record.
type file struct {
	*document
	record    record
	hasRecord bool
}

// Made says what has to be created before a kubeconfig can be written; the zero value is nothing.
type Made struct {
	File        bool
	Directories int
}

// Add adds a lab's entries to the text of a kubeconfig and makes the first of them the current context. Existing entries of
// the lab stay as they are, including what the user has added to a context. An entry of the same name that is not the lab's
// is a TakenError.
func Add(text []byte, lab string, entries []Entry, made Made) ([]byte, error) {
	before, err := others(text, lab)
	if err != nil {
		return nil, err
	}
	f, err := open(text)
	if err != nil {
		return nil, err
	}
	pristine := !f.hasRecord
	old, err := json.Marshal(f.record)
	if err != nil {
		return nil, err
	}
	if pristine {
		f.record = record{File: made.File, Directories: made.Directories}
	}
	if err := f.add(lab, entries); err != nil {
		return nil, err
	}
	if now, err := json.Marshal(f.record); err != nil {
		return nil, err
	} else if pristine || string(now) != string(old) {
		if err := f.writeRecord(); err != nil {
			return nil, err
		}
	}
	if err := verify(f.text, lab, before); err != nil {
		return nil, err
	}
	// Nothing is added that could not be removed again.
	back, gone, err := Remove(f.text, lab)
	if err != nil {
		return nil, err
	}
	if pristine && (string(back) != string(text) || gone.File != made.File) {
		return nil, refuse("removing the lab would not restore it")
	}
	return f.text, nil
}

func (f *file) add(lab string, entries []Entry) error {
	if f.root == nil {
		var n int
		for dec := yaml.NewDecoder(bytes.NewReader(f.text)); dec.Decode(&yaml.Node{}) == nil; {
			n++
		}
		if n > 1 {
			return refuse("the first of its documents is empty")
		}
		if err := f.insertLines(len(f.text), "apiVersion: v1\nkind: Config\n"); err != nil {
			return err
		}
		if f.root == nil {
			return refuse("nothing can be appended to it")
		}
		f.record.Made = append(f.record.Made, "apiVersion", "kind")
	}
	for _, e := range entries {
		if err := f.taken(lab, e.Name); err != nil {
			return err
		}
	}
	if err := f.setCurrent(lab, entries[0].Name); err != nil {
		return err
	}
	for _, e := range entries {
		body := map[string]any{}
		for kind, raw := range map[string]json.RawMessage{"cluster": e.Cluster, "user": e.User} {
			var v map[string]any
			if err := json.Unmarshal(raw, &v); err != nil {
				return fmt.Errorf("read the %s %s: %w", kind, e.Name, err)
			}
			body[kind] = v
		}
		body["context"] = map[string]any{"cluster": e.Name, "user": e.Name}
		for _, k := range kinds {
			if err := f.addEntry(k.list, k.item, e.Name, lab, body[k.item].(map[string]any)); err != nil {
				return err
			}
		}
	}
	return nil
}

// addEntry adds an item with the lab's mark to a list, unless it exists.
func (f *file) addEntry(list, kind, name, lab string, body map[string]any) error {
	for i, item := range f.items(list) {
		if item["name"] != name {
			continue
		}
		have, _ := item[kind].(map[string]any)
		if markOf(have) == lab && contains(have, body) {
			return nil
		}
		if err := f.deleteItem(list, i); err != nil {
			return err
		}
		break
	}
	body = maps.Clone(body)
	body["extensions"] = []any{map[string]any{"name": Mark, "extension": lab}}
	return f.put(list, map[string]any{"name": name, kind: body})
}

// taken returns a TakenError if an entry of that name exists that is not the lab's.
func (f *file) taken(lab, name string) error {
	for _, k := range kinds {
		owned := f.owned(k.list, lab)
		for i, item := range f.items(k.list) {
			if item["name"] == name && !owned[i] {
				return &TakenError{Kind: k.item, Name: name}
			}
		}
	}
	return nil
}

// put adds an item and records what was there instead of the list.
func (f *file) put(list string, item map[string]any) error {
	replaced, made, err := f.addItem(list, item)
	if err != nil {
		return err
	}
	if made && !slices.Contains(f.record.Made, list) {
		f.record.Made = append(f.record.Made, list)
	}
	if replaced != nil {
		if f.record.Replaced == nil {
			f.record.Replaced = map[string]string{}
		}
		if _, known := f.record.Replaced[list]; !known {
			f.record.Replaced[list] = *replaced
		}
	}
	return nil
}

// setCurrent makes a context of the lab the current one, unless one is already, and records the previous one.
func (f *file) setCurrent(lab, name string) error {
	k, v, _ := f.find(currentContext)
	if k == nil {
		f.setPrevious(lab, nil)
		f.record.Made = append(f.record.Made, currentContext)
		return f.addKey(currentContext, f.name(name))
	}
	from, to, err := f.value(k, v)
	if err != nil {
		return err
	}
	if v.Value == name {
		return nil
	}
	if !f.contexts(lab)[v.Value] {
		was := string(f.text[from:to])
		f.setPrevious(lab, &was)
	}
	return f.splice(from, to, f.name(name))
}

// setPrevious records what the current context was before the lab's.
func (f *file) setPrevious(lab string, was *string) {
	if f.record.Previous == nil {
		f.record.Previous = map[string]*string{}
	}
	f.unlink(lab)
	f.record.Previous[lab] = was
}

// unlink removes a lab from the linked list of previous contexts.
func (f *file) unlink(lab string) {
	was, known := f.record.Previous[lab]
	if !known {
		return
	}
	ours := f.contexts(lab)
	for other, p := range f.record.Previous {
		if p != nil && ours[scalar(*p)] {
			f.record.Previous[other] = was
		}
	}
	delete(f.record.Previous, lab)
}

// name returns a context's name as the text after a colon.
func (f *file) name(name string) string {
	if isFlow(f.root) {
		return fmt.Sprintf(" %q", name)
	}
	quoted, err := sigsyaml.Marshal(name)
	if err != nil {
		return fmt.Sprintf(" %q", name)
	}
	return " " + string(quoted[:len(quoted)-1])
}

// Remove removes everything that carries the lab's mark, and with the last lab everything that any lab has changed. Its
// second result is what was created for the file, to be removed with it if nothing else is in it.
func Remove(text []byte, lab string) ([]byte, Made, error) {
	if !bytes.Contains(text, []byte(Mark)) {
		return text, Made{}, nil // whatever its syntax
	}
	before, err := others(text, lab)
	if err != nil {
		return nil, Made{}, err
	}
	f, err := open(text)
	if err != nil || !f.marked(lab) {
		return text, Made{}, err
	}
	if err := f.remove(lab); err != nil {
		return nil, Made{}, err
	}
	if err := verify(f.text, lab, before); err != nil {
		return nil, Made{}, err
	}
	if f.record.File && !f.anyMarked() && f.hollow(before) {
		return nil, Made{File: true, Directories: f.record.Directories}, nil
	}
	return f.text, Made{}, nil
}

func (f *file) remove(lab string) error {
	ours := f.contexts(lab)
	was := f.record.Previous[lab]
	f.unlink(lab)
	type target struct {
		list  string
		index int
	}
	// A cluster or a user may be identified by its context, so all are found before any is removed. The last is removed
	// first.
	var targets []target
	for _, k := range kinds {
		for i, owned := range f.owned(k.list, lab) {
			if owned {
				targets = append(targets, target{k.list, i})
			}
		}
	}
	for _, t := range slices.Backward(targets) {
		if err := f.deleteItem(t.list, t.index); err != nil {
			return err
		}
		if len(f.items(t.list)) == 0 {
			if err := f.closeList(t.list); err != nil {
				return err
			}
		}
	}
	if k, v, _ := f.find(currentContext); k != nil && ours[v.Value] {
		if err := f.restoreCurrent(was); err != nil {
			return err
		}
	}
	if f.anyMarked() {
		return f.writeRecord()
	}
	return f.finish()
}

// restoreCurrent restores the text of the previous context. If there is none, the key is removed if a lab made it.
func (f *file) restoreCurrent(was *string) error {
	if was == nil && slices.Contains(f.record.Made, currentContext) {
		f.record.Made = slices.DeleteFunc(f.record.Made, func(s string) bool { return s == currentContext })
		return f.deleteKey(currentContext)
	}
	text := ` ""`
	if was != nil {
		text = *was
	}
	k, v, _ := f.find(currentContext)
	from, to, err := f.value(k, v)
	if err != nil {
		return err
	}
	return f.splice(from, to, text)
}

// closeList restores a list that has lost its last item to what it was before the first lab.
func (f *file) closeList(list string) error {
	if slices.Contains(f.record.Made, list) {
		return f.deleteKey(list)
	}
	if was, known := f.record.Replaced[list]; known {
		return f.restoreList(list, &was)
	}
	return f.restoreList(list, nil)
}

// finish removes what is left after the last lab's entries: the record, and apiVersion and kind if nothing else is there.
func (f *file) finish() error {
	if err := f.deleteRecord(); err != nil {
		return err
	}
	if !slices.Contains(f.record.Made, "kind") || len(f.root.Content) != 4 {
		return nil
	}
	for _, key := range []string{"kind", "apiVersion"} {
		if k, _, _ := f.find(key); k == nil {
			continue
		}
		if err := f.deleteKey(key); err != nil {
			return err
		}
	}
	return nil
}

const (
	currentContext = "current-context"
	extensions     = "extensions"
)

// writeRecord writes the record in memory to the file's text.
func (f *file) writeRecord() error {
	// What writing the record replaces is recorded as well, so only the second record is complete.
	for range 2 {
		if err := f.deleteRecord(); err != nil {
			return err
		}
		if err := f.put(extensions, map[string]any{"name": recordName, "extension": f.record}); err != nil {
			return err
		}
	}
	f.hasRecord = true
	return nil
}

func (f *file) deleteRecord() error {
	for i, item := range f.items(extensions) {
		if item["name"] != recordName {
			continue
		}
		if err := f.deleteItem(extensions, i); err != nil {
			return err
		}
		if len(f.items(extensions)) == 0 {
			return f.closeList(extensions)
		}
		return nil
	}
	return nil
}
