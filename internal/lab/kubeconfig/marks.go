package kubeconfig

import (
	"encoding/json"
	"reflect"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
	sigsyaml "sigs.k8s.io/yaml"
)

// open reads the text and the record in it.
func open(text []byte) (*file, error) {
	d, err := parse(text)
	if err != nil {
		return nil, refuse("%v", err)
	}
	f := &file{document: d}
	for _, item := range f.items(extensions) {
		if item["name"] == recordName {
			data, err := json.Marshal(item["extension"])
			if err == nil {
				err = json.Unmarshal(data, &f.record)
			}
			if err != nil {
				return nil, refuse("the extension %s is damaged: %v", recordName, err)
			}
			f.hasRecord = true
		}
	}
	return f, nil
}

// items returns what is in a list at the top; what is not a mapping is an empty one.
func (f *file) items(list string) []map[string]any {
	_, v, _ := f.find(list)
	if v == nil || v.Kind != yaml.SequenceNode {
		return nil
	}
	items := make([]map[string]any, len(v.Content))
	for i, n := range v.Content {
		_ = n.Decode(&items[i]) // of another type: no item of ours
	}
	return items
}

// markOf returns the lab whose mark a cluster, user or context has.
func markOf(body map[string]any) string {
	all, _ := body[extensions].([]any)
	for _, e := range all {
		if m, _ := e.(map[string]any); m["name"] == Mark {
			lab, _ := m["extension"].(string)
			return lab
		}
	}
	return ""
}

// owned says of each item of a list whether it is the lab's: it has the mark, or the context of its name has it and uses it.
// (Fathom once marked nothing but contexts.)
func (f *file) owned(list, lab string) []bool {
	items, contexts := f.items(list), f.items("contexts")
	owned := make([]bool, len(items))
	for _, k := range kinds {
		if k.list != list {
			continue
		}
		for i, item := range items {
			body, _ := item[k.item].(map[string]any)
			if mark := markOf(body); mark != "" || list == "contexts" {
				owned[i] = mark == lab
				continue
			}
			owned[i] = slices.ContainsFunc(contexts, func(c map[string]any) bool {
				context, _ := c["context"].(map[string]any)
				return markOf(context) == lab && c["name"] == item["name"] && context[k.item] == item["name"]
			})
		}
	}
	return owned
}

// contexts returns the names of the lab's contexts.
func (f *file) contexts(lab string) map[string]bool {
	names := map[string]bool{}
	owned := f.owned("contexts", lab)
	for i, item := range f.items("contexts") {
		if name, ok := item["name"].(string); ok && owned[i] {
			names[name] = true
		}
	}
	return names
}

// marked says whether anything is the lab's.
func (f *file) marked(lab string) bool {
	if _, known := f.record.Previous[lab]; known {
		return true
	}
	for _, k := range kinds {
		if slices.Contains(f.owned(k.list, lab), true) {
			return true
		}
	}
	return false
}

// anyMarked says whether anything is of any lab.
func (f *file) anyMarked() bool {
	for _, k := range kinds {
		for _, item := range f.items(k.list) {
			if body, _ := item[k.item].(map[string]any); markOf(body) != "" {
				return true
			}
		}
	}
	return false
}

// contains says whether all of want is in have.
func contains(have, want map[string]any) bool {
	for k, v := range want {
		if !reflect.DeepEqual(have[k], v) {
			return false
		}
	}
	return true
}

// scalar returns the value of a scalar's text.
func scalar(text string) string {
	var s string
	_ = yaml.Unmarshal([]byte(text), &s)
	return s
}

// others reads a kubeconfig as kubectl does and returns what in it is not the lab's, without what means the same as nothing.
// It says whether an edit has changed anything else: the edits work on the text.
func others(text []byte, lab string) (map[string]any, error) {
	all := map[string]any{}
	if err := sigsyaml.Unmarshal(text, &all); err != nil {
		return nil, refuse("it is not a kubeconfig: %v", err)
	}
	if all == nil { // the text is "null"
		all = map[string]any{}
	}
	f, err := open(text)
	if err != nil {
		return nil, err
	}
	for _, k := range kinds {
		items, _ := all[k.list].([]any)
		owned := f.owned(k.list, lab)
		if len(items) != len(owned) {
			return nil, refuse("the list %q is not written in the place where it is used", k.list)
		}
		var rest []any
		for i, item := range items {
			if !owned[i] {
				rest = append(rest, item)
			}
		}
		if items != nil {
			all[k.list] = rest
		}
	}
	list, _ := all[extensions].([]any)
	var rest []any
	for _, e := range list {
		if m, _ := e.(map[string]any); m["name"] != recordName {
			rest = append(rest, e)
		}
	}
	if list != nil {
		all[extensions] = rest
	}
	delete(all, currentContext) // that is what edits are about
	for key, v := range all {
		if empty(v) || key == "apiVersion" && v == "v1" || key == "kind" && v == "Config" {
			delete(all, key)
		}
	}
	return all, nil
}

func empty(v any) bool {
	switch v := v.(type) {
	case nil:
		return true
	case string:
		return v == ""
	case []any:
		return len(v) == 0
	case map[string]any:
		return len(v) == 0
	}
	return false
}

// verify compares what is not the lab's with what it was.
func verify(text []byte, lab string, before map[string]any) error {
	after, err := others(text, lab)
	if err != nil {
		return refuse("the edit would damage it: %v", err)
	}
	if !reflect.DeepEqual(before, after) {
		return refuse("the edit would change what is not the lab's")
	}
	return nil
}

// hollow says whether a file that was made for labs holds nothing now: no comment either, and no current context.
func (f *file) hollow(rest map[string]any) bool {
	_, current, _ := f.find(currentContext)
	return len(rest) == 0 && (current == nil || current.Value == "") && !strings.Contains(string(f.text), "#")
}
