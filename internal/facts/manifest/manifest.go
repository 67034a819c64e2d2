// Package manifest reads files of Kubernetes objects, as `kubectl apply -f` takes them.
package manifest

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/api/validate/content"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	jsonutil "k8s.io/apimachinery/pkg/util/json"
	"k8s.io/apimachinery/pkg/util/yaml"
)

// MaxSize bounds a manifest. The API server takes objects of up to 3 MB.
const MaxSize = 16 << 20

// maxProblems of one file are told: whoever names a file that is no manifest at all need not read about each line.
const maxProblems = 10

// File is a file of objects.
type File struct {
	Name string // for messages
	Data []byte
}

// Object is an object of a file. It has an apiVersion, a kind and a name, and can be applied more than once. Whether it is
// one that an API server takes, only the server can say.
type Object struct {
	*unstructured.Unstructured
	File string
	Line int // where its document begins, from 1
}

// String names the object and its place.
func (o Object) String() string {
	name := o.GetName()
	if ns := o.GetNamespace(); ns != "" {
		name = ns + "/" + name
	}
	return fmt.Sprintf("%s %s (%s:%d)", o.GetKind(), name, o.File, o.Line)
}

// Problem is one thing that is wrong with a file.
type Problem struct {
	Line     int // from 1; 0 for one of the whole file
	Document int // from 1, the same
	Text     string
}

func (p Problem) String() string {
	switch {
	case p.Document == 0:
		return p.Text
	case p.Line == 0:
		return fmt.Sprintf("document %d: %s", p.Document, p.Text)
	}
	return fmt.Sprintf("line %d (document %d): %s", p.Line, p.Document, p.Text)
}

// Parse reads the YAML or JSON documents of a file, whose name is for messages only. It returns objects or problems, and
// never both.
func Parse(data []byte, file string) ([]Object, []Problem) {
	if len(data) > MaxSize {
		return nil, []Problem{{Text: fmt.Sprintf("%d bytes long; want at most %d", len(data), MaxSize)}}
	}
	var objects []Object
	var problems []Problem
	for i, doc := range split(data) {
		add := func(line int, text string) {
			problems = append(problems, Problem{Line: line, Document: i + 1, Text: text})
		}
		values, err := decode(doc.text)
		if err != nil {
			line, text := yamlError(err)
			add(doc.line+max(line-1, 0), text)
			continue
		}
		for _, value := range values {
			o := Object{Unstructured: &unstructured.Unstructured{Object: value}, File: file, Line: doc.line}
			if wrong := check(value); wrong != "" {
				add(doc.line, wrong)
				continue
			}
			objects = append(objects, o)
		}
		if len(problems) >= maxProblems {
			break
		}
	}
	if len(problems) == 0 && len(objects) == 0 {
		problems = []Problem{{Text: "empty; want at least one object"}}
	}
	if len(problems) > 0 {
		return nil, problems[:min(len(problems), maxProblems)]
	}
	return objects, nil
}

// document is a part of a file that holds more than comments.
type document struct {
	line int // of its first value, from 1
	text []byte
}

// split cuts a file at the lines that begin or end a YAML document. apimachinery's readers, which do the same, tell no
// lines, and lose what stands on the line of a mark.
func split(data []byte) []document {
	var docs []document
	var doc document
	end := func() {
		if doc.line > 0 {
			docs = append(docs, doc)
		}
		doc = document{}
	}
	number := 0
	for line := range bytes.Lines(bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))) {
		number++
		if rest, is := afterMark(line); is {
			end()
			line = rest
		}
		content := bytes.TrimSpace(line)
		if doc.line == 0 && (len(content) == 0 || content[0] == '#' || line[0] == '%') { // a directive, which says nothing to us
			continue
		}
		if doc.line == 0 {
			doc.line = number
		}
		doc.text = append(doc.text, line...)
	}
	end()
	return docs
}

// afterMark returns what follows a mark between documents.
func afterMark(line []byte) (rest []byte, is bool) {
	for _, mark := range []string{"---", "..."} {
		rest, is = bytes.CutPrefix(line, []byte(mark))
		if is && (len(rest) == 0 || bytes.ContainsRune([]byte(" \t\r\n"), rune(rest[0]))) {
			return rest, true
		}
	}
	return nil, false
}

// decode reads a document: one YAML value, or JSON values one after the other. A list is as good as what is in it.
func decode(text []byte) ([]map[string]any, error) {
	values, err := decodeJSON(text)
	if err != nil { // YAML, which JSON is, too, but for tabs and for several values
		var value any
		if err := yaml.UnmarshalStrict(text, &value); err != nil {
			return nil, err
		}
		values = []any{value}
	}
	var objects []map[string]any
	for _, value := range values {
		if objects, err = flatten(objects, value, ""); err != nil {
			return nil, err
		}
	}
	return objects, nil
}

// flatten adds an object to the list, or what is in it if it is a list: v1's List, as kubectl writes it, or one of a kind, such
// as the API server's PodList, whose items need not say what they are. As for kubectl, lists may be in lists.
func flatten(objects []map[string]any, value any, at string) ([]map[string]any, error) {
	object, is := value.(map[string]any)
	if !is {
		return nil, errors.New(at + "no object; want apiVersion, kind and metadata")
	}
	kind, _ := object["kind"].(string)
	of, isList := strings.CutSuffix(kind, "List")
	metadata, _ := object["metadata"].(map[string]any)
	items, hasItems := object["items"].([]any)
	switch {
	case !isList || metadata["name"] != nil:
		return append(objects, object), nil
	case !hasItems && object["items"] != nil:
		return nil, fmt.Errorf("%sitems: no list; a %s has one of objects", at, kind)
	case !hasItems && of == "":
		return nil, fmt.Errorf("%sno items; a List has a list of objects", at)
	case !hasItems:
		return append(objects, object), nil
	}
	for i, item := range items {
		if object, is := item.(map[string]any); is && of != "" && object["kind"] == nil && object["apiVersion"] == nil {
			object["apiVersion"], object["kind"] = value.(map[string]any)["apiVersion"], of
		}
		var err error
		if objects, err = flatten(objects, item, fmt.Sprintf("%sitems[%d]: ", at, i)); err != nil {
			return nil, err
		}
	}
	return objects, nil
}

func decodeJSON(text []byte) ([]any, error) {
	var values []any
	for dec := json.NewDecoder(bytes.NewReader(text)); ; {
		var raw json.RawMessage
		err := dec.Decode(&raw)
		if errors.Is(err, io.EOF) {
			return values, nil
		}
		if err != nil {
			return nil, err
		}
		var value any
		if err := jsonutil.Unmarshal(raw, &value); err != nil { // whole numbers are int64, as everywhere in the API
			return nil, err
		}
		values = append(values, value)
	}
}

// check says what is wrong with an object that no API server needs to be asked about.
func check(object map[string]any) string {
	metadata, _ := object["metadata"].(map[string]any)
	apiVersion, hasVersion := object["apiVersion"].(string)
	kind, hasKind := object["kind"].(string)
	name, hasName := metadata["name"].(string)
	namespace, hasNamespace := metadata["namespace"].(string)
	_, generated := metadata["generateName"]
	version, err := schema.ParseGroupVersion(apiVersion)
	switch {
	case !hasVersion || apiVersion == "":
		return "no apiVersion; want one such as v1 or apps/v1"
	case err != nil || len(content.IsPathSegmentName(version.Group)) > 0 || len(content.IsPathSegmentName(version.Version)) > 0:
		return fmt.Sprintf("apiVersion: %q: want VERSION or GROUP/VERSION, such as apps/v1", apiVersion)
	case !hasKind || kind == "":
		return "no kind; want one such as Deployment"
	case generated:
		return "metadata.generateName: it would be another object each time; want metadata.name"
	case !hasName || name == "":
		return "no metadata.name; want text, which a number or a word such as yes needs quotes to be"
	case len(content.IsPathSegmentName(name)) > 0:
		return fmt.Sprintf("metadata.name: %q: no name of an object", name)
	case metadata["namespace"] != nil && !hasNamespace:
		return "metadata.namespace: want text, which a number or a word such as yes needs quotes to be"
	case len(content.IsPathSegmentName(namespace)) > 0:
		return fmt.Sprintf("metadata.namespace: %q: no name of a namespace", namespace)
	}
	// What the API server itself writes into an object that is there. It refuses it in one that is applied.
	for _, field := range []string{"managedFields", "resourceVersion", "uid"} {
		if metadata[field] != nil {
			return fmt.Sprintf("metadata.%s: only an object that is there has it; leave it out", field)
		}
	}
	return ""
}

// Twice returns an object that is in the list a second time, and the first. Of two that are applied at the same time,
// either could win.
func Twice(objects []Object) (again, first Object, found bool) {
	type id struct {
		schema.GroupKind
		namespace, name string
	}
	seen := map[id]Object{}
	for _, o := range objects {
		key := id{o.GroupVersionKind().GroupKind(), cmp.Or(o.GetNamespace(), "default"), o.GetName()}
		if first, found = seen[key]; found {
			return o, first, true
		}
		seen[key] = o
	}
	return Object{}, Object{}, false
}

var (
	yamlPrefix = regexp.MustCompile(`^(?:error converting YAML to JSON: )?yaml: (?:unmarshal errors:\n\s*)?`)
	yamlLine   = regexp.MustCompile(`^line (\d+): `)
)

// yamlError takes apart what the YAML parser says: the line, 0 if it names none, and the first problem.
func yamlError(err error) (int, string) {
	prefix := yamlPrefix.FindString(err.Error())
	if prefix == "" {
		return 0, err.Error()
	}
	text, _, _ := strings.Cut(err.Error()[len(prefix):], "\n")
	line := 0
	if m := yamlLine.FindStringSubmatch(text); m != nil {
		line, _ = strconv.Atoi(m[1])
		text = text[len(m[0]):]
	}
	return line, "not YAML: " + text
}
