package kubeconfig

import (
	"encoding/json"
	"reflect"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
	sigsyaml "sigs.k8s.io/yaml"
)

// open parses the text and the record in it.
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

// items returns the items of a list at the top level; an item that is not a mapping is empty.
func (f *file) items(list string) []map[string]any {
	_, v, _ := f.find(list)
	if v == nil || v.Kind != yaml.SequenceNode {
		return nil
	}
	items := make([]map[string]any, len(v.Content))
	for i, n := range v.Content {
		_ = n.Decode(&items[i]) // of another type: not an item of a lab
	}
	return items
}

// markOf returns the lab whose mark a cluster, user or context carries.
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

// owned reports for each item of a list whether it is the lab's: it carries the mark, or the context of its name does and
// uses it. (Fathom once marked only contexts.)
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

// marked reports whether anything carries the lab's mark.
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

// anyMarked reports whether anything carries any lab's mark.
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

// contains reports whether have contains all of want.
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

// others parses a kubeconfig as kubectl does and returns what is not the lab's, without values that are equivalent to
// absent ones. Comparing its results shows whether an edit of the text has changed anything else.
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
			return nil, refuse("the list %q is an alias or is merged from elsewhere", k.list)
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
	delete(all, currentContext) // edits are meant to change it
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

// verify checks that what is not the lab's is unchanged.
func verify(text []byte, lab string, before map[string]any) error {
	after, err := others(text, lab)
	if err != nil {
		return refuse("the edit would damage it: %v", err)
	}
	if !reflect.DeepEqual(before, after) {
		return refuse("the edit would change entries that are not the lab's")
	}
	return nil
}

// hollow reports whether a file that was created for labs is empty now: without comments and current context, too.
func (f *file) hollow(rest map[string]any) bool {
	_, current, _ := f.find(currentContext)
	return len(rest) == 0 && (current == nil || current.Value == "") && !strings.Contains(string(f.text), "#")
}
