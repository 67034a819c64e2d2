package manifest

import (
	"os"
	"slices"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	const object = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n"
	for _, tc := range []struct {
		name, in string
		want     []string
	}{
		{"one", object, []string{"ConfigMap a (f:1)"}},
		{"comments and marks", "\n# c\n--- # c\n" + object + "---\n# c\n---\n\n" + object + "...\n# c\n", []string{"ConfigMap a (f:4)", "ConfigMap a (f:11)"}},
		{"on the mark", "--- {apiVersion: v1, kind: A, metadata: {name: b, namespace: c}}\n", []string{"A c/b (f:1)"}},
		{"directive and byte order mark", "\ufeff%YAML 1.1\n---\r\napiVersion: v1\r\nkind: A\r\nmetadata:\r\n  name: b\r\n", []string{"A b (f:3)"}},
		{"marks in text", "apiVersion: v1\nkind: A\nmetadata: {name: b}\ndata:\n  x: |\n    ---\n    ---x\n", []string{"A b (f:1)"}},
		{"JSON, with tabs", "{\n\t\"apiVersion\": \"v1\",\n\t\"kind\": \"A\", \"metadata\": {\"name\": \"b\"}}\n{\"apiVersion\": \"v1\", \"kind\": \"A\", \"metadata\": {\"name\": \"c\"}}",
			[]string{"A b (f:1)", "A c (f:1)"}},
		{"list", "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: A, metadata: {name: b}}\n- {apiVersion: v1, kind: A, metadata: {name: c}}\n",
			[]string{"A b (f:1)", "A c (f:1)"}},
		{"list of a kind", "apiVersion: a/v1\nkind: SheepList\nmetadata: {resourceVersion: \"7\"}\nitems:\n- {metadata: {name: b}}\n- {apiVersion: v1, kind: A, metadata: {name: c}}\n",
			[]string{"Sheep b (f:1)", "A c (f:1)"}},
		{"list in a list", "{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: A, metadata: {name: b}}]}]}", []string{"A b (f:1)"}},
		{"a kind that ends so", "{apiVersion: a/v1, kind: AllowList, metadata: {name: b}, items: [x]}\n---\n{apiVersion: a/v1, kind: DenyList, metadata: {name: c}}\n", []string{"AllowList b (f:1)", "DenyList c (f:3)"}},
		{"list without items", "{apiVersion: v1, kind: List}", []string{"line 1 (document 1): no items; a List has a list of objects"}},
		{"items that are none", "{apiVersion: v1, kind: PodList, items: {a: b}}", []string{"line 1 (document 1): items: no list; a PodList has one of objects"}},
		{"text in a list in a list", "{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: List, items: [a]}]}",
			[]string{"line 1 (document 1): items[0]: items[0]: no object; want apiVersion, kind and metadata"}},
		{"empty", "", []string{"empty; want at least one object"}},
		{"comments", "# c\n---\n# c\n", []string{"empty; want at least one object"}},
		{"empty list", "{apiVersion: v1, kind: List, items: []}", []string{"empty; want at least one object"}},
		{"text", "hello\n", []string{"line 1 (document 1): no object; want apiVersion, kind and metadata"}},
		{"null", object + "---\nnull\n", []string{"line 5 (document 2): no object; want apiVersion, kind and metadata"}},
		{"text in a list", "apiVersion: v1\nkind: List\nitems: [a]\n", []string{"line 1 (document 1): items[0]: no object; want apiVersion, kind and metadata"}},
		{"not YAML", object + "---\na: b\nc: \"d\ne: f\n", []string{"line 8 (document 2): not YAML: found unexpected end of stream"}},
		{"indentation", object + "---\na: b\n c: d\n", []string{"line 6 (document 2): not YAML: mapping values are not allowed in this context"}},
		{"twice the same key", "a: b\na: c\n", []string{`line 2 (document 1): not YAML: key "a" already set in map`}},
		{"all at once", "kind: A\n---\napiVersion: v1\n---\napiVersion: v1\nkind: A\n---\napiVersion: a/b/c\nkind: A\n---\napiVersion: 1\n", []string{
			"line 1 (document 1): no apiVersion; want one such as v1 or apps/v1",
			"line 3 (document 2): no kind; want one such as Deployment",
			"line 5 (document 3): no metadata.name; want text, which a number or a word such as yes needs quotes to be",
			`line 8 (document 4): apiVersion: "a/b/c": want VERSION or GROUP/VERSION, such as apps/v1`,
			"line 11 (document 5): no apiVersion; want one such as v1 or apps/v1",
		}},
		{"path for a group", "apiVersion: ../v1\nkind: A\nmetadata: {name: b}\n",
			[]string{`line 1 (document 1): apiVersion: "../v1": want VERSION or GROUP/VERSION, such as apps/v1`}},
		{"generated", "apiVersion: v1\nkind: A\nmetadata: {generateName: b-}\n",
			[]string{"line 1 (document 1): metadata.generateName: it would be another object each time; want metadata.name"}},
		{"number for a name", "apiVersion: v1\nkind: A\nmetadata: {name: 1}\n", []string{"line 1 (document 1): no metadata.name; want text, which a number or a word such as yes needs quotes to be"}},
		{"path for a name", "apiVersion: v1\nkind: A\nmetadata: {name: a/b}\n", []string{`line 1 (document 1): metadata.name: "a/b": no name of an object`}},
		{"namespace", "apiVersion: v1\nkind: A\nmetadata: {name: a, namespace: ..}\n", []string{`line 1 (document 1): metadata.namespace: "..": no name of a namespace`}},
		{"namespaces", "apiVersion: v1\nkind: A\nmetadata: {name: a, namespace: [b]}\n", []string{"line 1 (document 1): metadata.namespace: want text, which a number or a word such as yes needs quotes to be"}},
		{"of another cluster", "apiVersion: v1\nkind: A\nmetadata: {name: a, resourceVersion: \"1\"}\n",
			[]string{"line 1 (document 1): metadata.resourceVersion: only an object that is there has it; leave it out"}},
		{"many", strings.Repeat("---\na\n", 100), slices.Collect(func(yield func(string) bool) {
			for _, n := range []string{"2 (document 1)", "4 (document 2)", "6 (document 3)", "8 (document 4)", "10 (document 5)", "12 (document 6)",
				"14 (document 7)", "16 (document 8)", "18 (document 9)", "20 (document 10)"} {
				yield("line " + n + ": no object; want apiVersion, kind and metadata")
			}
		})},
		{"large", strings.Repeat("#", MaxSize+1), []string{"16777217 bytes long; want at most 16777216"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			objects, problems := Parse([]byte(tc.in), "f")
			var got []string
			for _, o := range objects {
				got = append(got, o.String())
			}
			for _, p := range problems {
				got = append(got, p.String())
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("got\n  %s\nwant\n  %s", strings.Join(got, "\n  "), strings.Join(tc.want, "\n  "))
			}
		})
	}
}

// Values are as kubectl reads them: YAML 1.1, and whole numbers as such.
func TestValues(t *testing.T) {
	objects, problems := Parse([]byte("apiVersion: v1\nkind: A\nmetadata: {name: b}\nspec: {on: yes, mode: 0644, i: 3, f: 1.5, day: 2026-01-02}\n"), "f")
	if len(objects) != 1 {
		t.Fatal(problems)
	}
	want := map[string]any{"true": true, "mode": int64(0o644), "i": int64(3), "f": 1.5, "day": "2026-01-02"}
	for key, value := range objects[0].Object["spec"].(map[string]any) {
		if want[key] != value {
			t.Errorf("%s is %#v, want %#v", key, value, want[key])
		}
	}
}

func TestTwice(t *testing.T) {
	objects, problems := Parse([]byte(`
{apiVersion: a/v1, kind: A, metadata: {name: b}}
---
{apiVersion: a/v1, kind: A, metadata: {name: b, namespace: c}}
---
{apiVersion: v1, kind: A, metadata: {name: b}}
`), "f")
	if len(objects) != 3 {
		t.Fatal(problems)
	}
	if again, first, found := Twice(objects); found {
		t.Errorf("%v is taken for %v", again, first)
	}
	more, _ := Parse([]byte("{apiVersion: a/v2, kind: A, metadata: {name: b, namespace: default}}"), "g")
	again, first, found := Twice(append(objects, more...))
	if !found || again.String() != "A default/b (g:1)" || first.String() != "A b (f:2)" {
		t.Errorf("got %v of %v, %v", again, first, found)
	}
}

func FuzzParse(f *testing.F) {
	for _, file := range []string{"../../../deploy/fathom.yaml", "../../../docs/examples/hello.yaml"} {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte("{\"apiVersion\": \"v1\", \"kind\": \"List\", \"items\": [{}, 1]}\n{}\n--- a\n...\n%YAML 1.1\n"))
	f.Add([]byte("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		objects, problems := Parse(data, "f")
		if (len(objects) == 0) == (len(problems) == 0) {
			t.Fatalf("got %d objects and problems %v, want exactly one", len(objects), problems)
		}
		lines := strings.Count(string(data), "\n") + 1
		for _, o := range objects {
			if o.GetAPIVersion() == "" || o.GetKind() == "" || o.GetName() == "" || o.Line < 1 || o.Line > lines {
				t.Errorf("%v of %d lines", o, lines)
			}
			if _, err := o.MarshalJSON(); err != nil {
				t.Error(err)
			}
		}
		for _, p := range problems {
			if p.Text == "" || p.Line < 0 || p.Line > lines+1 {
				t.Errorf("%v of %d lines", p, lines)
			}
		}
		Twice(objects)
	})
}
