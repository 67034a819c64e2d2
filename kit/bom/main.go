// Command bom says of programs what they were built from: an SBOM, the licences and notices that go with them, and what
// the Go toolchain wrote into each about its versions and flags.
//
//	bom -kit bin/kit -out bin/notices bin/fathom* ...
//
// It writes sbom.spdx.json, THIRD_PARTY_NOTICES.txt and images.txt into -out, and the member "built" into kit.json. Everything is read from
// the programs themselves, not from a go.mod: what the linker has left out is of no interest, and a program that was
// built of something else than it should be is found. Without a licence for what is linked in, it fails.
package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"debug/buildinfo"

	spdxjson "github.com/spdx/tools-golang/json"
	"github.com/spdx/tools-golang/spdx/v2/common"
	"github.com/spdx/tools-golang/spdx/v2/v2_3"
)

// program is one that was built.
type program struct {
	File   string `json:"-"` // as it is called below bin/
	SHA256 string `json:"sha256"`
	Go     string `json:"go,omitempty"`
	// Package is the main package's path, Module and Version the module's that it is of.
	Package string            `json:"package,omitempty"`
	Module  string            `json:"module,omitempty"`
	Version string            `json:"version,omitempty"`
	Flags   map[string]string `json:"flags,omitempty"`

	linked []component
}

// component is what is linked into a program: a Go module, Go's own library, or a C library of the distribution's.
type component struct {
	path, version string // of a C library, "deb/PACKAGE"
}

func main() {
	kit := flag.String("kit", "bin/kit", "the kit's `DIRECTORY`")
	out := flag.String("out", "bin/notices", "`DIRECTORY` for what is written")
	check := flag.Bool("check", false, "compare the kit's programs with what kit.json says that they were built from, and write nothing")
	strict := flag.Bool("strict", false, "what is to be passed on: that a file in the images is of no package is an error, and no warning")
	flag.Parse()
	err := error(nil)
	if *check {
		err = verify(*kit)
	} else {
		err = run(*kit, *out, flag.Args(), *strict)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bom:", err)
		os.Exit(1)
	}
}

// kitFiles are what may be programs of a kit.
func kitFiles(kit string) (files []string, err error) {
	for _, pattern := range []string{"bin/*", "cni/*", "programs/*"} {
		found, err := filepath.Glob(filepath.Join(kit, pattern))
		if err != nil {
			return nil, err
		}
		files = append(files, found...)
	}
	return files, nil
}

// verify says how the programs of a kit are others than kit.json says.
func verify(kit string) error {
	text, err := os.ReadFile(filepath.Join(kit, "kit.json"))
	if err != nil {
		return err
	}
	var said struct {
		Built map[string]program `json:"built"`
	}
	if err := json.Unmarshal(text, &said); err != nil {
		return fmt.Errorf("%s/kit.json: %w", kit, err)
	}
	files, err := kitFiles(kit)
	if err != nil {
		return err
	}
	var errs []error
	for _, file := range files {
		p, err := read(file)
		if errors.Is(err, errNoProgram) {
			continue
		}
		if err != nil {
			return err
		}
		name, err := filepath.Rel(kit, file)
		if err != nil {
			return err
		}
		was, found := said.Built[name]
		delete(said.Built, name)
		p.linked = nil
		switch {
		case !found:
			errs = append(errs, fmt.Errorf("kit.json does not say what %s was built from: run `make notices`", name))
		case !reflect.DeepEqual(was, p):
			errs = append(errs, fmt.Errorf("%s is not what kit.json says: it is %+v, not %+v; run `make notices`", name, p, was))
		}
	}
	for name := range said.Built {
		errs = append(errs, fmt.Errorf("kit.json has %s, which is not there", name))
	}
	return errors.Join(errs...)
}

func run(kit, out string, own []string, strict bool) error {
	files, err := kitFiles(kit)
	if err != nil {
		return err
	}
	programs, built := []program{}, map[string]program{}
	for _, file := range append(own, files...) {
		p, err := read(file)
		if errors.Is(err, errNoProgram) {
			continue
		}
		if err != nil {
			return err
		}
		if name, err := filepath.Rel(kit, file); err == nil && filepath.IsLocal(name) {
			p.File = "kit/" + name
			built[name] = p
		} else {
			p.File = filepath.Base(file)
		}
		programs = append(programs, p)
	}
	if len(built) == 0 {
		return fmt.Errorf("no programs in %s: run `make kit`", kit)
	}
	images, err := readImages(filepath.Join(kit, "images", "index.json"))
	if err != nil {
		return err
	}
	licences, err := newLicences()
	if err != nil {
		return err
	}
	files, err = readDistribution(filepath.Join(kit, "images", "distribution"))
	if err != nil {
		return err
	}
	copied, stray, err := owners(files)
	if err != nil {
		return err
	}
	if len(stray) > 0 {
		err := fmt.Errorf("the images hold files of this machine that are of no package, so what they are under cannot be told: %s; install the "+
			"distribution's packages and run `bin/fathom image build`", strings.Join(stray, ", "))
		if strict {
			return err
		}
		fmt.Fprintln(os.Stderr, "bom:", err)
	}
	for _, p := range copied {
		if err := licences.add(p.component()); err != nil {
			return err
		}
	}
	for _, p := range programs {
		for _, c := range p.linked {
			if err := licences.add(c); err != nil {
				return fmt.Errorf("%s: %w", p.File, err)
			}
		}
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	var sbom bytes.Buffer
	if err := spdxjson.Write(document(programs, images, copied, licences), &sbom, spdxjson.Indent(" ")); err != nil {
		return err
	}
	return errors.Join(
		replace(filepath.Join(out, "sbom.spdx.json"), sbom.Bytes()),
		replace(filepath.Join(out, "images.txt"), digests(images)),
		replace(filepath.Join(out, "THIRD_PARTY_NOTICES.txt"), licences.notices(copied)),
		record(filepath.Join(kit, "kit.json"), built),
	)
}

// image is one of the local images: its name, and its manifest's digest, sha256:...
type image struct{ name, digest string }

// readImages reads the index of an OCI image layout. Without one there are no images yet.
func readImages(file string) (images []image, err error) {
	text, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var index struct {
		Manifests []struct {
			Digest      string            `json:"digest"`
			Annotations map[string]string `json:"annotations"`
		} `json:"manifests"`
	}
	if err := json.Unmarshal(text, &index); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	for _, m := range index.Manifests {
		name := m.Annotations["io.containerd.image.name"]
		if name == "" {
			return nil, fmt.Errorf("%s: the image %s has no name", file, m.Digest)
		}
		images = append(images, image{name, m.Digest})
	}
	slices.SortFunc(images, func(a, b image) int { return strings.Compare(a.name, b.name) })
	return images, nil
}

// digests lists images as `name@digest`, which is how a manifest pins one.
func digests(images []image) []byte {
	var b bytes.Buffer
	for _, i := range images {
		fmt.Fprintf(&b, "%s@%s\n", i.name, i.digest)
	}
	return b.Bytes()
}

var errNoProgram = errors.New("no program")

// read reads a program. Links, scripts and data are none.
func read(file string) (program, error) {
	if st, err := os.Lstat(file); err != nil {
		return program{}, err
	} else if !st.Mode().IsRegular() || st.Mode()&0o111 == 0 {
		return program{}, errNoProgram
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return program{}, err
	}
	if !bytes.HasPrefix(data, []byte("\x7fELF")) {
		return program{}, errNoProgram
	}
	p := program{SHA256: fmt.Sprintf("%x", sha256.Sum256(data))}
	info, err := buildinfo.Read(bytes.NewReader(data))
	if err != nil {
		// pause, which is C: its source is Kubernetes', and libc is linked in.
		if filepath.Base(file) != "pause" {
			return program{}, fmt.Errorf("read what %s was built from: %w", file, err)
		}
		p.linked, err = cLibraries("libc6-dev")
		return p, err
	}
	p.Go, p.Package, p.Module, p.Version = info.GoVersion, info.Path, info.Main.Path, info.Main.Version
	p.Flags = map[string]string{}
	for _, s := range info.Settings {
		if strings.HasPrefix(s.Key, "-") || strings.HasPrefix(s.Key, "CGO_") || strings.HasPrefix(s.Key, "GO") {
			p.Flags[s.Key] = s.Value
		}
	}
	p.linked = append(p.linked, component{"std", info.GoVersion})
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		p.linked = append(p.linked, component{m.Path, m.Version})
	}
	if p.Flags["CGO_ENABLED"] == "1" { // runc, static
		c, err := cLibraries("libc6-dev", "libseccomp-dev")
		if err != nil {
			return p, err
		}
		p.linked = append(p.linked, c...)
	}
	return p, nil
}

// record writes what was built into kit.json, beside the versions that are there.
func record(file string, built map[string]program) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	members := map[string]json.RawMessage{}
	if err := json.Unmarshal(text, &members); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	if members["built"], err = json.Marshal(built); err != nil {
		return err
	}
	text, err = json.MarshalIndent(members, "", "  ")
	if err != nil {
		return err
	}
	return replace(file, append(text, '\n'))
}

// replace writes a file, unless it says that already: the kit's age is that of kit.json.
func replace(file string, data []byte) error {
	if have, err := os.ReadFile(file); err == nil && bytes.Equal(have, data) {
		return nil
	}
	if err := os.WriteFile(file+".new", data, 0o644); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

// document is the SBOM: a package for each program and for each thing that is linked into any. Its name follows from what
// it says, and so does its time from SOURCE_DATE_EPOCH, so the same build has the same SBOM.
func document(programs []program, images []image, copied []debian, l *licences) *v2_3.Document {
	id := func(name string) common.ElementID {
		return common.ElementID("SPDXRef-" + strings.Map(func(r rune) rune {
			if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '-' {
				return r
			}
			return '-'
		}, name))
	}
	sum := sha256.New()
	for _, p := range programs {
		fmt.Fprintln(sum, p.File, p.SHA256)
	}
	for _, i := range images {
		fmt.Fprintln(sum, i.name, i.digest)
	}
	const self = common.ElementID("SPDXRef-DOCUMENT")
	d := &v2_3.Document{
		SPDXVersion: v2_3.Version, DataLicense: v2_3.DataLicense, SPDXIdentifier: self, DocumentName: "fathom",
		DocumentNamespace: fmt.Sprintf("https://github.com/fathom-network/fathom/sbom/%x", sum.Sum(nil)),
		CreationInfo:      &v2_3.CreationInfo{Created: epoch().Format(time.RFC3339), Creators: []common.Creator{{CreatorType: "Tool", Creator: "fathom-kit-bom"}}},
		OtherLicenses:     l.others(),
	}
	relate := func(a common.ElementID, kind string, b common.ElementID) {
		d.Relationships = append(d.Relationships, &v2_3.Relationship{RefA: common.DocElementID{ElementRefID: a}, Relationship: kind, RefB: common.DocElementID{ElementRefID: b}})
	}
	for _, p := range programs {
		made := "C, statically linked"
		if p.Go != "" {
			made = fmt.Sprintf("%s of %s %s, by %s", p.Package, p.Module, p.Version, p.Go)
		}
		d.Packages = append(d.Packages, &v2_3.Package{PackageName: p.File, PackageSPDXIdentifier: id("Program-" + p.File), PackageVersion: p.Version, PackageFileName: p.File,
			PackageDownloadLocation: "NOASSERTION", PackageLicenseConcluded: "NOASSERTION", PackageLicenseDeclared: "NOASSERTION", PackageCopyrightText: "NOASSERTION",
			PackageSourceInfo: made, PackageChecksums: []common.Checksum{{Algorithm: common.SHA256, Value: p.SHA256}}, PrimaryPackagePurpose: "APPLICATION"})
		relate(self, common.TypeRelationshipDescribe, id("Program-"+p.File))
		for _, c := range p.linked {
			relate(id("Program-"+p.File), common.TypeRelationshipStaticLink, id("Linked-"+c.path+"-"+c.version))
		}
	}
	for _, i := range images {
		_, hex, _ := strings.Cut(i.digest, ":")
		d.Packages = append(d.Packages, &v2_3.Package{PackageName: i.name, PackageSPDXIdentifier: id("Image-" + i.name),
			PackageDownloadLocation: "NOASSERTION", PackageLicenseConcluded: "NOASSERTION", PackageLicenseDeclared: "NOASSERTION", PackageCopyrightText: "NOASSERTION",
			PackageChecksums: []common.Checksum{{Algorithm: common.SHA256, Value: hex}}, PrimaryPackagePurpose: "CONTAINER"})
		relate(self, common.TypeRelationshipDescribe, id("Image-"+i.name))
	}
	for _, p := range copied {
		c := p.component()
		relate(self, common.TypeRelationshipDescribe, id("Linked-"+c.path+"-"+c.version))
	}
	for _, c := range l.components() {
		found := l.of[c]
		d.Packages = append(d.Packages, &v2_3.Package{PackageName: c.path, PackageSPDXIdentifier: id("Linked-" + c.path + "-" + c.version), PackageVersion: c.version,
			PackageDownloadLocation: "NOASSERTION", PackageLicenseConcluded: found.expression, PackageLicenseDeclared: "NOASSERTION", PackageCopyrightText: "NOASSERTION",
			PrimaryPackagePurpose:     "LIBRARY",
			PackageExternalReferences: []*v2_3.PackageExternalReference{{Category: common.CategoryPackageManager, RefType: common.TypePackageManagerPURL, Locator: c.purl()}}})
	}
	return d
}

// epoch is the time of the build: SOURCE_DATE_EPOCH, which the Makefile makes that of the commit.
func epoch() time.Time {
	var seconds int64
	_, _ = fmt.Sscan(os.Getenv("SOURCE_DATE_EPOCH"), &seconds)
	return time.Unix(seconds, 0).UTC()
}

// purl is a component's package URL, https://github.com/package-url/purl-spec.
func (c component) purl() string {
	if name, ok := strings.CutPrefix(c.path, "deb/"); ok {
		return "pkg:deb/" + distribution() + "/" + name + "@" + strings.ReplaceAll(c.version, "+", "%2B")
	}
	return "pkg:golang/" + c.path + "@" + strings.ReplaceAll(c.version, "+", "%2B")
}

// notices is the text of all licences, each once, with what it is of.
func (l *licences) notices(copied []debian) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "The programs of Fathom and of its kit are made of the following, under the licences that follow.\n")
	if len(copied) > 0 {
		fmt.Fprintf(&b, "\nThe local images hold files of these binary packages of %s, unchanged. What they were built from are the source\n"+
			"packages beside them, which %[1]s has of every version: https://snapshot.debian.org, https://launchpad.net/ubuntu.\n\n", distribution())
		for _, p := range copied {
			fmt.Fprintf(&b, "%s %s, of source package %s %s\n", p.name, p.version, p.source, p.sourceVersion)
		}
	}
	of := map[string][]string{} // by text
	for _, c := range l.components() {
		for _, text := range slices.Concat(l.of[c].texts, l.of[c].common) {
			of[text] = append(of[text], strings.TrimSpace(c.path+" "+c.version))
		}
	}
	for _, text := range slices.SortedFunc(maps.Keys(of), func(a, b string) int { return strings.Compare(of[a][0]+a, of[b][0]+b) }) {
		fmt.Fprintf(&b, "\n%s\n\n", strings.Repeat("=", 80))
		for _, name := range of[text] {
			fmt.Fprintln(&b, name)
		}
		fmt.Fprintf(&b, "\n%s\n", strings.TrimSpace(text))
	}
	return b.Bytes()
}
